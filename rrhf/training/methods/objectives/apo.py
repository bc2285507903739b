"""APO: DPO with control over whether the likelihoods of both responses rise or fall.

D'Oosterlinck et al. 2024, arXiv:2408.06266, equations 7 and 8, for the
pairs of a list of any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rrhf.ranges import POSITIVE
from rrhf.training.methods.objectives.parts import Lists, PairSettings, over_pairs
from rrhf.training.methods.objectives.spec import RankLoss, RankObjectiveSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class APOSettings(PairSettings):
    """The loss of APO. The paper's learning rate is 2e-7."""

    beta: float = 0.1
    """Scale of the implicit rewards, beta * (log p - log p_reference)."""

    apo_form: Literal["zero", "down"] = "zero"
    """zero = raise the likelihood of the better response and lower that of the worse one, for data
    whose better responses beat the policy's own; down = lower both, the worse one more, for other
    data."""

    RANGES: ClassVar = {"beta": POSITIVE}


def build(settings: APOSettings) -> RankLoss:
    """Build the loss with its term `apo`."""
    from rrhf.algorithms.pair_losses import (  # flags are read without torch
        apo_down_loss,
        apo_zero_loss,
    )

    loss_of = {"zero": apo_zero_loss, "down": apo_down_loss}[settings.apo_form]

    def measure(lists: Lists, pairs: Tensor) -> tuple[Tensor, Tensor]:
        rewards = settings.beta * lists.log_ratios()
        return loss_of(rewards, pairs), rewards

    return over_pairs("apo", settings, measure)


APO = RankObjectiveSpec(APOSettings, build, needs_reference=True)
