"""REBEL: gaps of log ratios are regressed on gaps of scores.

Gao et al. 2024, arXiv:2404.16767, over every two candidates of a list; the reference is the policy
at the start of the run, so `rrhf train iterative` is the paper's algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rrhf.ranges import POSITIVE, check_ranges
from rrhf.training.methods.objectives.parts import averaged, log_ratios
from rrhf.training.methods.objectives.spec import RankedGroups, RankLoss, RankObjectiveSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class REBELSettings:
    """The loss of REBEL: the mean over a prompt's pairs, averaged over prompts. Equal scores are a
    pair too, in a prompt that has different scores."""

    eta: float = 1.0
    """Nats of log p - log p_reference per unit of score, so it has to fit their scale; a smaller
    value keeps the policy nearer to the reference."""

    def __post_init__(self) -> None:
        check_ranges(self, {"eta": POSITIVE})


def build(settings: REBELSettings) -> RankLoss:
    """The term `rebel`."""
    from rrhf.algorithms.pair_losses import all_pairs, rebel_loss  # flags are read without torch

    def measure(
        groups: RankedGroups, logprobs: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ratios = log_ratios(groups, logprobs, reference)
        pairs = all_pairs(groups.scores, groups.valid)
        return rebel_loss(ratios, groups.scores, pairs, settings.eta), ratios / settings.eta

    return averaged("rebel", lambda g: all_pairs(g.scores, g.valid).sum((-2, -1)), measure)


REBEL = RankObjectiveSpec(REBELSettings, build, needs_reference=True)
