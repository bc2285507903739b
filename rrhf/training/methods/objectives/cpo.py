"""CPO: DPO under a uniform reference, with cross-entropy on the best response.

Xu et al. 2024, arXiv:2401.08417, for the pairs of a list of any length. The paper's equation sums
cross-entropy over tokens; its authors' program averages over tokens, which is the default here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rrhf.ranges import NOT_NEGATIVE, POSITIVE, check_ranges
from rrhf.training.methods.objectives.parts import (
    PairSettings,
    SFTReduction,
    over_pairs,
    with_sft,
)
from rrhf.training.methods.objectives.spec import RankedGroups, RankLoss, RankObjectiveSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class CPOSettings(PairSettings):
    """The loss of CPO."""

    beta: float = 0.1
    """Scale of the rewards, beta * log-prob of the whole response."""

    sft_weight: float = 1.0
    """Weight of the cross-entropy on the best response."""

    sft_reduction: SFTReduction = "token"
    """How the cross-entropy of the best responses is averaged: prompt = sum over the tokens of
    each, then mean over prompts; response = mean over the tokens of each, then mean over prompts;
    token = mean over all their tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"beta": POSITIVE, "sft_weight": NOT_NEGATIVE})


def build(settings: CPOSettings) -> RankLoss:
    """Build the loss with its terms `cpo` and `sft`."""
    from rrhf.algorithms.pair_losses import logistic_loss  # flags are read without torch

    def measure(
        groups: RankedGroups, logprobs: Tensor, reference: Tensor | None, pairs: Tensor
    ) -> tuple[Tensor, Tensor]:
        rewards = settings.beta * logprobs
        return logistic_loss(rewards, pairs), rewards

    rank = over_pairs("cpo", settings, measure)
    return with_sft(rank, settings.sft_weight, settings.sft_reduction)


CPO = RankObjectiveSpec(CPOSettings, build)
