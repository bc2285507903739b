"""How much memory one training step needs beyond weights and gradients.

Each variant runs in a process of its own, so that nothing is left over from another: weights and
gradients are there, a small step has loaded what loads lazily, then the highest resident size that
Linux notes during one step, less the size before it. One run each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.rrhf_step import BASELINE, VARIANTS, Step, every_pair_violated
from benchmarks.shapes import SHAPES

# Without these, freed blocks would stay with the process and hide what a step really needs.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def run(shape_name: str, names: list[str]) -> dict[str, Any]:
    """The peak of each variant in MiB, and the baseline's over its own."""
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    found = {name: _in_a_fresh_process(shape_name, name) for name in names}
    return {
        "benchmark": "peak_memory",
        "shape_name": shape_name,
        "shape": SHAPES[shape_name],
        "extra_mib": {name: round(value, 1) for name, value in found.items()},
        "times_less": {name: round(found[BASELINE] / value, 2) for name, value in found.items()},
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{result['shape_name']}: extra memory of one step"]
    for name, value in result["extra_mib"].items():
        lines.append(f"  {name:27} {value:8.0f} MiB   / {result['times_less'][name]}")
    return "\n".join(lines)


def _in_a_fresh_process(shape_name: str, variant: str) -> float:
    command = [sys.executable, "-m", "benchmarks.peak_memory", shape_name, variant]
    env = {**os.environ, **_GIVE_BACK}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measured(shape_name: str, variant: str) -> float:
    """MiB, in this very process."""
    torch.set_num_threads(1)
    shape = SHAPES[shape_name]
    policy = VARIANTS[variant].build(shape)
    small = replace(shape, prompt=8, responses=(4,) * len(shape.responses))
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
    print(measured(*sys.argv[1:]))
