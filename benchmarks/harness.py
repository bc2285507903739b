"""Ratios that a busy machine does not spoil: CPU time, one thread, interleaved rounds.

Wall time of two programs that run one after the other compares the machine's moods. Here every
round runs each variant once, in an order that turns around from round to round, and only ratios
within a round are kept; what a variant does the first time is left out. On a quiet machine or a
busy one the median then agrees to a few hundredths.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]


class NotMeasured(Exception):
    """What this machine lacks for a benchmark: a GPU, a package."""


@dataclass(frozen=True)
class Ratio:
    """How many times as long the baseline took, over the rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, ratios: list[float]) -> Ratio:
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.lowest:.2f}-{self.highest:.2f}]"


@dataclass(frozen=True)
class Timing:
    """One variant's CPU seconds in each round, and the baseline's over its own."""

    seconds: list[float]
    speed_up: Ratio


Stopwatch = Callable[[Callable[[], object]], float]
"""The seconds that a call takes."""


def cpu_seconds(call: Callable[[], object]) -> float:
    """Of this process, all threads together."""
    started = time.process_time()
    call()
    return time.process_time() - started


def children_clock() -> float:
    """CPU seconds of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def children_seconds(call: Callable[[], object]) -> float:
    """CPU time of the processes that the call starts and waits for."""
    started = children_clock()
    call()
    return children_clock() - started


def cuda_seconds(call: Callable[[], object]) -> float:
    """Between two events on the GPU's current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def stopwatch(device: str) -> Stopwatch:
    """CUDA events on a GPU, CPU time otherwise."""
    return cuda_seconds if device.startswith("cuda") else cpu_seconds


def timed(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    are_warm: bool = False,
    watch: Stopwatch = cpu_seconds,
) -> dict[str, Timing]:
    """Run the variants in interleaved rounds.

    Args:
        variants: what to run, the baseline first.
        rounds: that count.
        are_warm: each variant has run before; otherwise one more round is run and left out.
        watch: what takes the time.
    """
    assert rounds > 0, "a ratio needs a round"
    torch.set_num_threads(1)
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds if are_warm else rounds + 1):
        for name in names if number % 2 else reversed(names):
            seconds[name].append(watch(variants[name]))
    counted = {name: taken[-rounds:] for name, taken in seconds.items()}
    baseline = counted[names[0]]
    return {
        name: Timing(
            [round(value, 4) for value in taken],
            Ratio.of([base / mine for base, mine in zip(baseline, taken, strict=True)]),
        )
        for name, taken in counted.items()
    }


def milliseconds(timing: Timing) -> float:
    """Of the middle round."""
    return 1000 * statistics.median(timing.seconds)


def lines(timings: Mapping[str, Timing], differences: Mapping[str, Mapping[str, float]]) -> str:
    """Each variant on a line, for the terminal."""
    found = []
    for name, timing in timings.items():
        off = max(differences.get(name, {"": 0.0}).values(), default=0.0)
        equal = f"   off by {off:.0e}" if off else ""
        found.append(f"  {name:27} {milliseconds(timing):8.0f} ms   x {timing.speed_up}{equal}")
    return "\n".join(found)


def load() -> float:
    """How many processes want the machine, over the last minute."""
    return round(os.getloadavg()[0], 1)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": load(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@cache
def code() -> dict[str, str | None]:
    """What was measured: the commit, and a digest of the sources as they lie there."""
    digest = hashlib.sha256()
    for folder in ("rrhf", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return {"commit": commit or None, "sources": digest.hexdigest()[:12]}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """The result as JSON, with machine, versions and commit; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**result, "machine": machine(), "code": code()}
    staged = path.with_suffix(".part")
    staged.write_text(json.dumps(whole, indent=1, default=asdict) + "\n")
    staged.replace(path)


def is_current(path: Path) -> bool:
    """Whether a result is there that these very sources measured."""
    result = json.loads(path.read_text()) if path.exists() else {"not_measured": "yet"}
    return "not_measured" not in result and result.get("code") == code()


def read_all(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every result of a folder, by benchmark and case."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {(result["benchmark"], result["case"]): result for result in found}
