"""DPO on ranked lists: a logistic loss on the implicit rewards of each compared pair.

Rafailov et al. 2023, arXiv:2305.18290, equation 7, over the pairs of a list of any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rrhf.ranges import POSITIVE, check_ranges
from rrhf.training.methods.objectives.spec import (
    RankedGroups,
    RankLoss,
    RankObjectiveSpec,
    RankTerms,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class DPOSettings:
    """The loss of DPO. Its usual learning rate is a tenth of fine-tuning's: 5e-7 to 5e-6."""

    beta: float = 0.1
    """Implicit rewards are this times log p - log p_reference; a larger value keeps the policy
    nearer to the reference."""

    pairs: Literal["all", "best-worst", "adjacent"] = "all"
    """Which pairs of a list are compared: all = every two of different scores; best-worst = the
    best with the worst; adjacent = each with those of the next higher score."""

    pair_reduction: Literal["prompt", "pair"] = "prompt"
    """prompt = the mean over a prompt's pairs, averaged over the prompts that have some; pair = the
    mean over all pairs, so that longer lists weigh more."""

    def __post_init__(self) -> None:
        check_ranges(self, {"beta": POSITIVE})


def build(settings: DPOSettings) -> RankLoss:
    """The term `dpo`."""
    from rrhf.algorithms.dpo_losses import chosen_pairs, dpo_loss  # flags are read without torch

    by_prompt = settings.pair_reduction == "prompt"

    def pairs_of(groups: RankedGroups) -> Tensor:
        return chosen_pairs(groups.scores, groups.valid, settings.pairs)

    def counts(groups: RankedGroups) -> dict[str, Tensor]:
        count = pairs_of(groups).sum((-2, -1))
        return {"dpo": count.clamp_max(1) if by_prompt else count}

    def terms(groups: RankedGroups, logprobs: Tensor, reference: Tensor | None) -> RankTerms:
        assert reference is not None, "DPO needs a reference"
        rewards = settings.beta * (logprobs - reference)
        pairs = pairs_of(groups)
        loss = dpo_loss(rewards, pairs)
        if by_prompt:
            loss = loss / pairs.sum((-2, -1)).clamp_min(1)
        exist = groups.valid.sum(-1)
        total = (rewards.detach() * groups.valid).sum(-1)
        return RankTerms({"dpo": loss}, rewards.detach(), {"implicit_reward": (total, exist)})

    return RankLoss({"dpo": 1.0}, counts, terms)


DPO = RankObjectiveSpec(DPOSettings, build, needs_reference=True)
