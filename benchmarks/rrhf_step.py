"""One training step of RRHF (forward and backward) against the original-style step.

Scores are set against the policy's own ranking, so that every pair is violated and every candidate
has a gradient: the worst case for a layout that leaves the others out. Losses and gradients are
compared before anything is timed.

`shared_prefix` is the layout as users have it. Where float32 goes by oneDNN (`onednn_linear`), part
of its speed comes of that: `shared_prefix_mkl` goes without, `original_onednn` gives it to the
baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import lines, timed
from benchmarks.original_step import OriginalStyle
from benchmarks.shapes import SHAPES, Shape
from benchmarks.training_step import EXACT, TrainingStep, compared
from rrhf.data.collate import TokenBatch
from rrhf.models.forward.layouts import FastPolicy, build_policy
from rrhf.models.forward.logprobs import Policy
from rrhf.models.forward.onednn_linear import exchange_linears
from rrhf.models.loading import enable_checkpointing
from rrhf.training.methods.objectives.rrhf import RRHF, RRHFSettings
from rrhf.training.methods.rank import RankObjective

CASES = SHAPES
GOALS = {"S1": 3.0, "S3": 4.0, "S5": 4.2, "S4": 3.8, "S6": 1.8, "B6": 7.0}
ROUNDS = {"S3": 3, "S5": 3, "S4": 3}

BASELINE = "original"
HALF = 0.05
"""By how much a loss and a gradient may differ, relatively, in bfloat16."""


def _checkpointed(shape: Shape) -> nn.Module:
    model = shape.model()
    enable_checkpointing(model.train())
    return build_policy(model, "shared_prefix")


def _original_onednn(shape: Shape) -> nn.Module:
    model = shape.model()
    exchange_linears(model)
    return OriginalStyle(model)


@dataclass(frozen=True)
class Variant:
    """One way to compute a step.

    Attributes:
        build: the policy.
        tolerance: relative to the baseline's numbers.
        usual_products: as in `TrainingStep`.
    """

    build: Callable[[Shape], nn.Module]
    tolerance: float = EXACT
    usual_products: bool = False


VARIANTS = {
    BASELINE: Variant(lambda shape: OriginalStyle(shape.model())),
    "padded": Variant(lambda shape: Policy(shape.model())),
    "padded_chunked_head": Variant(lambda shape: FastPolicy(shape.model(), "rows")),
    "dense_mask": Variant(lambda shape: build_policy(shape.model(), "dense_mask")),
    "shared_prefix": Variant(lambda shape: build_policy(shape.model(), "shared_prefix")),
    "shared_prefix_mkl": Variant(
        lambda shape: build_policy(shape.model(), "shared_prefix"), usual_products=True
    ),
    "original_onednn": Variant(_original_onednn),
    "shared_prefix_checkpointed": Variant(_checkpointed),
    "shared_prefix_bf16": Variant(
        lambda shape: build_policy(shape.model().bfloat16(), "shared_prefix"), HALF
    ),
    "original_bf16": Variant(lambda shape: OriginalStyle(shape.model().bfloat16()), HALF),
}

DEFAULT = ("shared_prefix", "shared_prefix_mkl", "original_onednn")
SHOWN = {"B6": ("shared_prefix_bf16", "shared_prefix", "original_bf16")}
"""The variants of a case where none are asked for; the goal is the first one's."""


class Step(TrainingStep):
    """RRHF, rank loss and likelihood of the best, on one batch."""

    def __init__(self, policy: nn.Module, batch: TokenBatch, usual_products: bool = False) -> None:
        super().__init__(policy, usual_products)
        self.batch = batch
        self.objective = RankObjective(RRHF.build(RRHFSettings()))

    def forward(self) -> Tensor:
        terms = self.objective(self.policy(self.batch), self.batch)
        return torch.stack([term.weight * term.total for term in terms.values()]).sum()


def run(case: str, rounds: int, variants: Sequence[str] = ()) -> dict[str, Any]:
    """Compare, then time.

    Raises:
        AssertionError: a variant computes something else than the baseline.
    """
    shape = CASES[case]
    batch = every_pair_violated(shape)
    asked = variants or SHOWN.get(case, DEFAULT)
    names = [BASELINE, *(name for name in asked if name != BASELINE)]
    steps = {
        name: Step(VARIANTS[name].build(shape), batch, VARIANTS[name].usual_products)
        for name in names
    }
    differences = compared(steps, {name: VARIANTS[name].tolerance for name in names})
    timings = timed(steps, rounds, are_warm=True)
    return {
        "benchmark": "rrhf_step",
        "case": case,
        "shape": shape,
        "theory": shape.theory(),
        "relative_differences": differences,
        "timings": timings,
    }


def every_pair_violated(shape: Shape) -> TokenBatch:
    """The shape's batch, the likeliest response scored lowest."""
    plain = shape.batch()
    with torch.no_grad():
        logprobs = Policy(shape.model().eval())(plain).logprobs
    means = logprobs.sum(1) / plain.response_lengths
    return shape.batch((-means).tolist())


def table(result: dict[str, Any]) -> str:
    """For people."""
    head = f"{result['case']}: {result['shape']}; FLOP ratio {result['theory']:.2f}"
    return head + "\n" + lines(result["timings"], result["relative_differences"])
