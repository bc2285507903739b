"""Combines several scorers into one; `rrhf.ensemble_names` defines the names and the rules.

Every member scores every candidate. A candidate that one member cannot score has no score. Members
run one after the other, each on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rrhf.ensemble_names import EnsembleName, Member
from rrhf.errors import UserError
from rrhf.records import Candidate, CandidateSet
from rrhf.scoring.scorer import Scorer


class EnsembleScorer(Scorer):
    """Combines the normalised scores of several scorers.

    Args:
        ensemble: members and rule.
        scorers: the members' scorers, in order.
        normalize: whether the scores of each member must be normalised; if False, scores of members
            without a normaliser are used unchanged.

    Raises:
        UserError: the scores of a member would be normalised twice, or not at all.
    """

    def __init__(
        self, ensemble: EnsembleName, scorers: Sequence[Scorer], normalize: bool = True
    ) -> None:
        self._ensemble, self._scorers = ensemble, list(scorers)
        for member, scorer in zip(ensemble.members, scorers, strict=True):
            require_scale(member, scorer.normalized, normalize)
        self._scales = [member.scale or (0.0, 1.0) for member in ensemble.members]
        names = [
            f"{'' if member.weight == 1 else f'{member.weight:g}*'}{scorer.name}"
            f"{'' if member.scale is None else '@{:g}/{:g}'.format(*member.scale)}"
            for member, scorer in zip(ensemble.members, scorers, strict=True)
        ]
        factor = f"{ensemble.factor:g}:" if ensemble.rule == "mean_minus_deviation" else ""
        self.name = f"{ensemble.rule}:{factor}{','.join(names)}"
        self.normalized = normalize
        weights = [abs(member.weight) for member in ensemble.members]
        units = [
            weight * deviation * scorer.logits_per_unit
            for weight, (_, deviation), scorer in zip(weights, self._scales, scorers, strict=True)
        ]
        self.logits_per_unit = sum(units) / sum(weights) if any(weights) else 1.0
        self.is_relative = any(scorer.is_relative for scorer in scorers)
        windows = [scorer.window for scorer in scorers if scorer.window is not None]
        self.window = min(windows, default=None)
        models = [scorer.model for scorer in scorers if scorer.model is not None]
        self.model = nn.ModuleList(models) if models else None

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Return the combined scores, in order; None where a member gave None."""
        found = [scorer.score(sets) for scorer in self._scorers]
        return [
            [self._combined(scores) for scores in zip(*rows, strict=True)]
            for rows in zip(*found, strict=True)
        ]

    def _combined(self, scores: Sequence[float | None]) -> float | None:
        known = [
            (score - mean) / deviation
            for score, (mean, deviation) in zip(scores, self._scales, strict=True)
            if score is not None
        ]
        return self._ensemble.combine(known) if len(known) == len(scores) else None

    def describe(self) -> dict[str, Any]:
        """Describe the ensemble for a manifest, with the members' entries."""
        members = [
            {**scorer.describe(), "weight": member.weight, "scale": member.scale}
            for member, scorer in zip(self._ensemble.members, self._scorers, strict=True)
        ]
        rule = {"rule": self._ensemble.rule, "factor": self._ensemble.factor}
        return super().describe() | rule | {"members": members}

    def fits(self, s: CandidateSet, candidate: Candidate) -> bool:
        """Whether the response fits into every member's window."""
        return all(scorer.fits(s, candidate) for scorer in self._scorers)


def require_scale(member: Member, is_normalized: bool, normalize: bool = True) -> None:
    """Refuse a member whose scores are normalised twice, or not at all.

    Args:
        member: the member's parsed name.
        is_normalized: whether the scorer already normalises its scores.
        normalize: whether scores must be normalised.

    Raises:
        UserError: the member's scores would be normalised twice, or not at all.
    """
    if member.scale is not None and is_normalized:
        raise UserError(
            f"{member.scorer}: has its own normaliser; leave out the @ and what follows, or add "
            "--normalize false"
        )
    if member.scale is None and not is_normalized and normalize:
        raise UserError(
            f"{member.scorer}: has no normaliser, so its scores may not be on the scale of the "
            "other members; give their mean and deviation as NAME@MEAN/DEVIATION (`rrhf "
            "evaluate-reward` shows both), or write NAME@0/1 to use the scores unchanged"
        )
