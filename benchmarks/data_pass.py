"""What rows of a candidate file cost to read, check and score, against `json.loads`.

    python -m benchmarks.data_pass --rows 20000 --rounds 5
    python -m benchmarks.data_pass --whole 1000000     # the commands themselves, time and memory

Every figure of the first form is the CPU time of this process for one way through a file that a
stage wrote, as a multiple of the time that `json.loads` takes for its lines in the same round; the
order is reversed from round to round. The same file measures an earlier version:
`PYTHONPATH=EARLIER python benchmarks/data_pass.py`. The second form runs `rrhf score` with a Python
function and `rrhf train rank --max_steps 3` on a model of random weights, each in a process of its
own, and takes off what the same command needs for 16 rows; it also tells when the row of the first
step is written.

Left out on purpose: tokens (a tokenizer's own time hides all of this), and, in the first form, the
clock on the wall, of which the disk takes its share when rows are forced to it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FORMS = ("short", "hh")
BASELINE = "json.loads"


def row(form: str, number: int) -> dict[str, object]:
    """A row of 98 bytes, or of about 1 KB with a conversation, as HH has them."""
    if form == "short":
        return {
            "query": f"question number {number:07d} of many",
            "responses": [f"yes {number:07d}", f"no, not {number:07d}, ok"],
        }
    asked = [f"why is {number} a number, and who has said so? " * 4, f"and then, {number}? " * 5]
    turns = [("user", asked[0]), ("assistant", "because it is one. " * 6), ("user", asked[1])]
    cues = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return {
        "query": "".join(cues[role] + said for role, said in turns) + "\n\nAssistant:",
        "responses": [f"it is {number}, as ever. " * 5, f"nobody knows {number}. " * 5],
        "messages": [{"role": role, "content": said} for role, said in turns],
    }


def length_of(prompts: list[str], responses: list[str], messages: list[object]) -> list[float]:
    """A scorer that costs next to nothing."""
    return [float(len(response)) for response in responses]


def parse(path: Path) -> None:
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)


def ways(path: Path, score: bool) -> dict[str, Callable[[], object]]:
    """What is measured, by name; each goes through the whole file once."""
    from rrhf.data.candidate_files import CandidateFile

    opened = CandidateFile(path)

    def read() -> None:
        for _ in opened:
            pass

    found: dict[str, Callable[[], object]] = {
        BASELINE: lambda: parse(path),
        "open and check": lambda: CandidateFile(path).close(),
        "read again, in order": read,
    }
    if score:
        from rrhf.scoring.config import ScoreConfig
        from rrhf.scoring.stage import score_file

        def scored() -> None:
            output = path.with_name("scored.jsonl")
            for old in path.parent.glob("scored.*"):
                old.unlink()
            scorer = f"function:{__spec__.name if __spec__ else 'data_pass'}:length_of"
            score_file(ScoreConfig(input_file=str(path), output_file=str(output), scorer=scorer))

        found["score"] = scored
    return found


def measure(path: Path, rounds: int, score: bool) -> dict[str, list[float]]:
    """CPU seconds of each way in each round; the first time of each is left out."""
    calls = ways(path, score)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            started = time.process_time()
            calls[name]()
            if number:
                seconds[name].append(time.process_time() - started)
    return seconds


def report_line(form: str, rows: int, size: int, seconds: dict[str, list[float]]) -> str:
    lines = [f"{form}: {rows:,} rows of {size // rows} bytes"]
    for name, own in seconds.items():
        ratios = [one / base for one, base in zip(own, seconds[BASELINE], strict=True)]
        lines.append(
            f"  {name:22} {statistics.median(own) / rows * 1e6:7.2f} us a row, "
            f"{statistics.median(ratios):5.2f} [{min(ratios):.2f}-{max(ratios):.2f}] times "
            f"{BASELINE}"
        )
    return "\n".join(lines)


def commands(folder: Path, source: Path, name: str) -> dict[str, list[str]]:
    """The commands from a file of candidates to the first steps, by what they are called."""
    scored = folder / f"{name}.scored.jsonl"
    scorer = f"function:{Path(__file__).stem}:length_of"
    rank = ["train", "rank", "--model_name_or_path", str(folder / "model"), "--data_path"]
    limits = ["--max_steps", "3", "--model_max_length", "256", "--save_steps", "1000"]
    return {
        "score": ["score", str(source), str(scored), "--scorer", scorer],
        "train rank": [*rank, str(scored), "--output_dir", str(folder / f"{name}.run"), *limits],
    }


class Took(NamedTuple):
    """What a command took.

    Attributes:
        wall, cpu: seconds on the wall, and of CPU.
        memory: peak in MB.
        start: seconds on the wall and of CPU until the row of the first step was written, if any.
    """

    wall: float
    cpu: float
    memory: int
    start: tuple[float, float] | None


def timed(words: list[str], metrics: Path) -> Took:
    """Run a command; `metrics` is where a training writes the rows of its steps."""
    call = f"import sys; from rrhf.cli.main import run_command; sys.exit(run_command({words!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    began, start = time.monotonic(), None
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, "-c", call], env=environment, stdout=told, stderr=told
        )
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            if start is None and metrics.exists() and metrics.stat().st_size:
                start = (time.monotonic() - began, cpu_of(process.pid))
            time.sleep(0.02)
        _, status, usage = ended
        if status:
            told.seek(0)
            raise RuntimeError(told.read().decode()[-2000:])
    seconds = time.monotonic() - began
    return Took(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss >> 10, start)


def cpu_of(process: int) -> float:
    """Seconds of CPU that a running process has used (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def whole(folder: Path, form: str, rows: int) -> None:
    """Print what each command takes for this many rows, beyond what it takes for 16."""
    from rrhf.worlds.tiny_model import TinySize, build_tiny_llama, build_tokenizer

    texts = [str(row("hh", number)) for number in range(50)]
    tokenizer = build_tokenizer(texts, 500, folder / "model")
    build_tiny_llama(TinySize(500), tokenizer).save_pretrained(folder / "model")

    def all_timed(name: str, source: Path) -> dict[str, Took]:
        metrics = folder / f"{name}.run" / "metrics.jsonl"
        return {
            command: timed(words, metrics)
            for command, words in commands(folder, source, name).items()
        }

    few = all_timed("few", write(folder / "few.jsonl", form, 16))
    source = write(folder / "many.jsonl", form, rows)
    print(f"{form}: {rows:,} rows, {source.stat().st_size / 1e6:.0f} MB")
    for command, took in all_timed("many", source).items():
        less = few[command]
        print(
            f"  {command:12} {took.wall:6.1f} s (16 rows: {less.wall:.1f} s), CPU {took.cpu:6.1f} "
            f"s, {(took.cpu - less.cpu) / rows * 1e6:5.1f} us a row; peak {took.memory} MB (16 "
            f"rows: {less.memory} MB)"
        )
        if took.start is not None and less.start is not None:
            print(
                f"  {'first step':12} after {took.start[0]:.1f} s (16 rows: {less.start[0]:.1f} s),"
                f" CPU {took.start[1]:.1f} s (16 rows: {less.start[1]:.1f} s)"
            )


def write(path: Path, form: str, rows: int) -> Path:
    """A file as a stage writes it."""
    from rrhf.data.candidate_files import write_candidate_sets
    from rrhf.data.candidate_rows import parse_candidate_set

    write_candidate_sets(path, (parse_candidate_set(row(form, n), "") for n in range(rows)))
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--without_score", action="store_true", help="read and check alone")
    parser.add_argument("--whole", type=int, help="run the commands on this many rows")
    given = parser.parse_args(arguments)
    for form in given.forms:
        with tempfile.TemporaryDirectory() as folder:
            if given.whole:
                whole(Path(folder), form, given.whole)
                continue
            path = write(Path(folder) / f"{form}.jsonl", form, given.rows)
            seconds = measure(path, given.rounds, not given.without_score)
            print(report_line(form, given.rows, path.stat().st_size, seconds))


if __name__ == "__main__":
    main()
