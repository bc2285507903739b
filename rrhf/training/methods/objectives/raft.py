"""Fine-tuning on the best candidate of each prompt: RAFT, the control of every ranking loss.

Dong et al. 2023, arXiv:2304.06767, in the form for a file of candidates; in rounds with fresh
samples it is their algorithm 1. The same as RRHF with rank weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rrhf.training.methods.objectives.parts import SFTReduction, sft_counts, sft_losses
from rrhf.training.methods.objectives.spec import (
    RankedGroups,
    RankLoss,
    RankObjectiveSpec,
    RankTerms,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RAFTSettings:
    """Cross-entropy on the best candidate."""

    sft_reduction: SFTReduction = "prompt"
    """prompt = sum over the tokens of a best response, response = mean over them, each averaged
    over prompts; token = mean over all tokens."""


def build(settings: RAFTSettings) -> RankLoss:
    """The term `sft`."""
    from rrhf.algorithms.rank_losses import sequence_scores  # flags are read without torch

    def counts(groups: RankedGroups) -> dict[str, Tensor]:
        return {"sft": sft_counts(groups, settings.sft_reduction)}

    def terms(groups: RankedGroups, logprobs: Tensor, reference: Tensor | None) -> RankTerms:
        loss = sft_losses(groups, logprobs, settings.sft_reduction)
        return RankTerms({"sft": loss}, sequence_scores(logprobs, groups.lengths).detach())

    return RankLoss({"sft": 1.0}, counts, terms, without_order=None)


RAFT = RankObjectiveSpec(RAFTSettings, build)
