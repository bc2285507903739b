"""How much memory one training step needs beyond weights and gradients.

Each variant runs in a process of its own, so that nothing is left over from another: weights and
gradients are there, a small step has loaded what loads lazily, then the highest resident size that
Linux notes during one step, less the size before it.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT
from benchmarks.rrhf_step import BASELINE, VARIANTS, Step, every_pair_violated
from benchmarks.shapes import SHAPES, Shape

# Without these, freed blocks would stay with the process and hide what a step really needs.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


TABLE = "memory"
CASES = {"S3": SHAPES["S3"], "S3_checkpointed": SHAPES["S3"], "S4": SHAPES["S4"]}
GOALS = {"S3": 5.0, "S3_checkpointed": 18.0}
ROUNDS = dict.fromkeys(CASES, 1)
SHOWN = {"S3_checkpointed": "shared_prefix_checkpointed"}


def run(case: str, rounds: int, variants: Sequence[str] = ()) -> dict[str, Any]:
    """The peak of each variant in MiB (the median over rounds), and the baseline's over its own."""
    shape = CASES[case]
    asked = variants or [SHOWN.get(case, "shared_prefix")]
    names = [BASELINE, *(name for name in asked if name != BASELINE)]
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(_in_a_fresh_process(shape, name))
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {
        "benchmark": "peak_memory",
        "case": case,
        "shape": shape,
        "theory": None,
        "extra_mib": {name: round(value, 1) for name, value in middle.items()},
        "times_less": {name: round(middle[BASELINE] / value, 4) for name, value in middle.items()},
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{result['case']}: {result['shape']}; extra memory of one step"]
    for name, value in result["extra_mib"].items():
        lines.append(f"  {name:27} {value:8.0f} MiB   / {result['times_less'][name]:.2f}")
    return "\n".join(lines)


def _in_a_fresh_process(shape: Shape, variant: str) -> float:
    command = [sys.executable, "-m", "benchmarks.peak_memory", json.dumps(asdict(shape)), variant]
    env = {**os.environ, **_GIVE_BACK}
    done = subprocess.run(command, env=env, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def measured(shape: Shape, variant: str) -> float:
    """MiB, in this very process."""
    torch.set_num_threads(1)
    policy = VARIANTS[variant].build(shape)
    # Large enough for the kernels of the real step: their code counts as memory once it is read in.
    small = replace(shape, prompt=64, responses=(32,) * len(shape.responses))
    Step(policy, small.batch([float(k) for k in range(len(shape.responses))]))()
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = Step(policy, every_pair_violated(shape))
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step.forward().backward()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"this system notes no {name}"
    return int(found.group(1)) / 1024


if __name__ == "__main__":
    print(measured(Shape(**json.loads(sys.argv[1])), sys.argv[2]))
