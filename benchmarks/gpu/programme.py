"""Runs the parts: a process each, a budget each, and every result written as it comes.

A part that dies is started again for the items that are left; one that uses its time up is ended,
and what it had found stays. Started again with the same output folder, the programme goes on where
it was. Exit codes: 0 everything passed, 1 something failed, 2 there is no GPU and `--tiny` was not
given, 75 some items were cut short: the same command goes on with them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.book import CUT, DONE, FAILED, Book
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.setting import Setting
from benchmarks.harness import ROOT

NO_GPU, GO_ON = 2, 75
OUTPUT = ROOT / "benchmarks" / "results" / "gpu"
LOG = "gpu.log"
CHILD = ("-m", "benchmarks.gpu.child")
"""The program of a part's process."""

PATIENCE_OF_A_CPU = 4
"""How many times a part's budget it has there: nothing is measured, and others use the machine."""

LEAST_SECONDS = 5.0
"""A part is not begun with less."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    add("--output", type=Path, help=f"folder for gpu.json and gpu.md (default: {OUTPUT})")
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    add("--minutes", type=float, default=25.0, help="for all of it (25); run it again to go on")
    add("--tiny", action="store_true", help="small shapes, on the CPU where there is no GPU")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    add("--fresh", action="store_true", help="forget earlier results in --output")
    add("--scratch", help="folder for models and runs, some 20 GB at full size")
    add("--peak_tflops", type=float, help="dense bfloat16 peak of the card, where it is not known")
    add("--trl_path", help="folder that holds TRL 1.16 (trl116/)")
    add("--trl_python", help="interpreter of an environment with TRL 1.10 (trl-env/bin/python)")


def main(arguments: list[str]) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    add_arguments(parser)
    asked = parser.parse_args(arguments)
    device = asked.device or ("cuda" if _has_gpu() else "cpu")
    if device == "cpu" and not asked.tiny:
        print(
            "python -m benchmarks gpu: no CUDA device is visible; add --tiny to go through the "
            "same programme with small shapes on the CPU",
            file=sys.stderr,
        )
        return NO_GPU
    name = "tiny" if asked.tiny else "gpu"
    output = asked.output or (OUTPUT if name == "gpu" else Path(tempfile.gettempdir(), "rrhf-tiny"))
    with contextlib.ExitStack() as stack:
        scratch = asked.scratch or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="rrhf-gpu-", ignore_cleanup_errors=True)
        )
        setting = Setting(
            device, asked.tiny, scratch, asked.peak_tflops, asked.trl_path, asked.trl_python
        )
        book = Book(output, {"device": device, "tiny": asked.tiny}, asked.fresh)
        return run(book, setting, asked.parts, 60 * asked.minutes)


def run(book: Book, setting: Setting, parts: list[str], seconds: float) -> int:
    """Every part that is asked for, within the seconds; the exit code."""
    ends = time.monotonic() + seconds
    cut: list[str] = []
    with open(book.folder / LOG, "a") as log, _stopped_by_signals():
        for part in parts:
            patience = 1 if setting.on_gpu else PATIENCE_OF_A_CPU
            left = min(patience * PARTS[part][1], ends - time.monotonic())
            print(f"{part}: {PARTS[part][0]}", flush=True)
            if book.is_complete(part):
                print(f"  {len(book.items(part))} results kept", flush=True)
            elif left < LEAST_SECONDS:
                book.note(part, "not begun: the time for all parts was used up")
                cut.append(part)
            elif not _run_part(book, setting, part, left, log):
                cut.append(part)
            else:
                book.complete(part)
    print(f"results: {book.folder / 'gpu.json'}, {book.folder / 'gpu.md'}", flush=True)
    failures = book.failures()
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    if cut:
        print(f"cut short: {', '.join(cut)}; run the same command again to go on", file=sys.stderr)
    return 1 if failures else GO_ON if cut else 0


def _run_part(book: Book, setting: Setting, part: str, seconds: float, log: IO[str]) -> bool:
    """Whether every item was settled, or failed."""
    ends = time.monotonic() + seconds
    book.note(part, None)
    tried: set[str] = set()
    while True:
        items: list[str] | None = None
        begun: str | None = None
        settled = [item for item in book.items(part) if book.is_settled(part, item)]
        skipped = sorted({*settled, *tried})
        with _child(part, setting, skipped, log) as child:
            for record in _records(child, ends):
                if "items" in record:
                    items = record["items"]
                    book.only(part, items)
                    for item in settled:
                        if item in items and item not in tried:
                            print(f"  {item}: kept", flush=True)
                elif "begin" in record:
                    begun = record["begin"]
                else:
                    tried.add(begun := record.pop("item"))
                    book.put(part, begun, **record)
                    _say(book, part, begun)
                    begun = None
            is_late = child.poll() is None and time.monotonic() >= ends
            if not is_late:
                child.wait()
        if is_late:
            if begun is not None:
                book.put(part, begun, CUT, f"after the part's {seconds:.0f} seconds")
                _say(book, part, begun)
            book.note(part, f"cut short: its {seconds:.0f} seconds were used up")
            return False
        if items is not None and set(items) <= {*settled, *tried}:
            return True
        if begun is None and (items is None or not tried - set(skipped)):
            book.note(part, f"its process ended with {child.returncode}; see {LOG}")
            book.put(part, "start", FAILED, f"the process ended with {child.returncode}")
            return True
        if begun is not None:
            tried.add(begun)
            book.put(part, begun, FAILED, f"its process ended with {child.returncode}; see {LOG}")
            _say(book, part, begun)


def _say(book: Book, part: str, item: str) -> None:
    entry = book.items(part)[item]
    word = "" if entry["status"] == DONE else f"{entry['status']}: "
    print(f"  {item}: {word}{entry['line']}   ({entry['seconds']:.0f} s)", flush=True)


@contextlib.contextmanager
def _child(
    part: str, setting: Setting, skipped: list[str], log: IO[str]
) -> Iterator[subprocess.Popen[str]]:
    """The process of a part; what is left of it and its children is ended."""
    threads = {} if setting.on_gpu else {"OMP_NUM_THREADS": "1"}
    log.write(f"--- {part}\n")
    log.flush()
    child = subprocess.Popen(
        [sys.executable, *CHILD, part, setting.as_json(), *skipped],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **threads},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def _records(child: subprocess.Popen[str], ends: float) -> Iterator[dict[str, Any]]:
    """What the process tells, until it ends or its time is over."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert child.stdout is not None
        with contextlib.suppress(ValueError):  # it was closed
            for line in child.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, ends - time.monotonic()))
        except queue.Empty:
            return
        if line is None:
            return
        yield json.loads(line)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does: the processes that it started are ended first."""

    def stop(*_: object) -> None:
        raise SystemExit(GO_ON)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _has_gpu() -> bool:
    """Asked in a process of its own: looking takes memory of the card."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0
