"""DPO for whole rankings: the order of the scores under the Plackett-Luce model.

Rafailov et al. 2023, arXiv:2305.18290, appendix A.3; of the best few alone, Tang and Feng 2025,
arXiv:2510.23631. Candidates of equal score do not compete with each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rrhf.ranges import COUNT, POSITIVE, check_ranges
from rrhf.training.methods.objectives.parts import log_ratios, over_lists
from rrhf.training.methods.objectives.spec import RankedGroups, RankLoss, RankObjectiveSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class DPOPLSettings:
    """DPO for rankings. A prompt's loss is a sum over ranks, so it grows with the list."""

    beta: float = 0.1
    """Implicit rewards are this times log p - log p_reference."""

    top_m: int | None = None
    """Fit the best so many ranks alone; by default all."""

    def __post_init__(self) -> None:
        check_ranges(self, {"beta": POSITIVE, "top_m": COUNT})


def build(settings: DPOPLSettings) -> RankLoss:
    """The term `dpo_pl`."""
    from rrhf.algorithms.list_losses import plackett_luce_loss  # flags are read without torch

    def measure(
        groups: RankedGroups, logprobs: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rewards = settings.beta * log_ratios(groups, logprobs, reference)
        return plackett_luce_loss(rewards, groups.scores, groups.valid, settings.top_m), rewards

    return over_lists("dpo_pl", measure)


DPO_PL = RankObjectiveSpec(DPOPLSettings, build, needs_reference=True)
