"""The RRHF loss on TRL's fused head against the layout that computes every prompt once.

The same rows, the same loss, the same gradients; the original-style step stands beside them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks import trl_peer
from benchmarks.harness import lines, timed
from benchmarks.original_step import OriginalStyle
from benchmarks.rrhf_step import Step, every_pair_violated
from benchmarks.shapes import SHAPES
from benchmarks.training_step import compared
from rrhf.models.forward.layouts import build_policy

CASES = {"S1": SHAPES["S1"], "S1_32k": replace(SHAPES["S1"], vocabulary=32768)}
GOALS = {"S1": 4.0, "S1_32k": 8.0}
SETTINGS = trl_peer.SETTINGS


def run(case: str, rounds: int, trl_path: str | None = None) -> dict[str, Any]:
    """Compare, then time."""
    shape = CASES[case]
    batch = every_pair_violated(shape)
    steps = {
        "trl": Step(trl_peer.FusedHeadRows(shape.model(), trl_path), batch),
        "shared_prefix": Step(build_policy(shape.model(), "shared_prefix"), batch),
        "shared_prefix_mkl": Step(
            build_policy(shape.model(), "shared_prefix"), batch, usual_products=True
        ),
        "original": Step(OriginalStyle(shape.model()), batch),
    }
    differences = compared(steps)
    work = shape.work()
    return {
        "benchmark": "trl_head",
        "case": case,
        "shape": shape,
        # Its backward pass computes the logits once more: four multiplications, not three.
        "theory": (work.rows_body + 4 / 3 * work.rows_head) / (work.body + work.head),
        "relative_differences": differences,
        "versions": {"trl": trl_peer.version()},
        "timings": timed(steps, rounds, are_warm=True),
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    head = f"{result['case']}: {result['shape']}; FLOP ratio {result['theory']:.2f}"
    return head + "\n" + lines(result["timings"], result["relative_differences"])
