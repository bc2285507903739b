"""QRPO: each implicit reward is regressed on the quantile of its score, by an exact normaliser.

Matrenok et al. 2025, arXiv:2507.08068. Quantiles are taken among the prompt's own candidates, which
should be samples of the policy that is trained; the paper draws further samples for them.
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
class QRPOSettings:
    """The loss of QRPO: the mean over a prompt's candidates, averaged over prompts."""

    beta: float = 0.1
    """Implicit rewards are this times log p - log p_reference; a larger value keeps the policy
    nearer to the reference."""

    def __post_init__(self) -> None:
        check_ranges(self, {"beta": POSITIVE})


def build(settings: QRPOSettings) -> RankLoss:
    """The term `qrpo`."""
    from rrhf.algorithms.point_losses import qrpo_loss, quantiles  # flags are read without torch
    from rrhf.algorithms.rank_losses import ranked_candidates

    def measure(
        groups: RankedGroups, logprobs: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ratios = log_ratios(groups, logprobs, reference)
        counted = ranked_candidates(groups.scores, groups.valid)
        targets = quantiles(groups.scores, groups.valid)
        return qrpo_loss(ratios, targets, counted, settings.beta), settings.beta * ratios

    return averaged("qrpo", lambda g: ranked_candidates(g.scores, g.valid).sum(-1), measure)


QRPO = RankObjectiveSpec(QRPOSettings, build, needs_reference=True)
