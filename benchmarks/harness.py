"""Ratios that a busy machine does not spoil: CPU time, one thread, interleaved rounds.

Wall time of two programs that run one after the other compares the machine's moods. Here every
round runs each variant once, in an order that turns around from round to round, and only ratios
within a round are kept; what a variant does the first time is left out. On a quiet machine or a
busy one the median then agrees to a few hundredths.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers


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


def timed(
    variants: Mapping[str, Callable[[], object]], rounds: int, are_warm: bool = False
) -> dict[str, Timing]:
    """Run the variants in interleaved rounds.

    Args:
        variants: what to run, the baseline first.
        rounds: that count.
        are_warm: each variant has run before; otherwise one more round is run and left out.
    """
    assert rounds > 0, "a ratio needs a round"
    torch.set_num_threads(1)
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds if are_warm else rounds + 1):
        for name in names if number % 2 else reversed(names):
            started = time.process_time()
            variants[name]()
            seconds[name].append(time.process_time() - started)
    counted = {name: taken[-rounds:] for name, taken in seconds.items()}
    baseline = counted[names[0]]
    return {
        name: Timing(
            [round(value, 4) for value in taken],
            Ratio.of([base / mine for base, mine in zip(baseline, taken, strict=True)]),
        )
        for name, taken in counted.items()
    }


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
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "clock": "process CPU time",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(path: Path, result: Mapping[str, Any]) -> None:
    """The result as JSON, with machine and versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**result, "machine": machine()}
    path.write_text(json.dumps(whole, indent=1, default=asdict) + "\n")
