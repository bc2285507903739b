"""Fine-tuning on the best candidate of each prompt: RAFT, the control of every ranking loss.

Dong et al. 2023, arXiv:2304.06767, in the form for a file of candidates; in rounds with fresh
samples it is their algorithm 1. The same as RRHF with rank weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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

    sft_reduction: Literal["prompt", "response", "token"] = "prompt"
    """prompt = sum over the tokens of a best response, response = mean over them, each averaged
    over prompts; token = mean over all tokens."""


def build(settings: RAFTSettings) -> RankLoss:
    """The term `sft`."""
    import torch  # flags are read without it

    from rrhf.algorithms import rank_losses

    def best_lengths(groups: RankedGroups) -> Tensor:
        return rank_losses.of_best_candidate(groups.lengths, groups.scores, groups.valid)

    def counts(groups: RankedGroups) -> dict[str, Tensor]:
        by_token = settings.sft_reduction == "token"
        return {"sft": best_lengths(groups) if by_token else torch.ones_like(groups.weights)}

    def terms(groups: RankedGroups, logprobs: Tensor, reference: Tensor | None) -> RankTerms:
        loss = rank_losses.best_candidate_nll(logprobs, groups.scores, groups.valid)
        if settings.sft_reduction == "response":
            loss = loss / best_lengths(groups).clamp_min(1)
        p = rank_losses.sequence_scores(logprobs, groups.lengths)
        return RankTerms({"sft": loss}, p.detach())

    return RankLoss({"sft": 1.0}, counts, terms, without_order=None)


RAFT = RankObjectiveSpec(RAFTSettings, build)
