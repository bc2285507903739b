"""Parses the names of ensembles: several scorers that together give one score.

    mean:A,B                       the mean of the members' scores
    minimum:A,B                    the lowest score
    mean_minus_deviation:A,B       the mean minus the members' deviation from it
    mean_minus_deviation:0.5:A,B   the mean minus half that deviation
    sum:0.7*A,0.3*B                a weighted sum; members without a weight have weight 1

A member is named like any scorer, but cannot itself be an ensemble. Scores of members can be
combined only if they have the same scale. They are therefore normalised: by the member's own
normaliser, or by the mean and deviation that follow its name (`function:brevity:score@-30/12`).

Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from rrhf.errors import UserError

RULES: Mapping[str, Callable[[Sequence[float], float], float]] = {
    "mean": lambda scores, factor: fmean(scores),
    "minimum": lambda scores, factor: min(scores),
    "mean_minus_deviation": lambda scores, factor: fmean(scores) - factor * pstdev(scores),
    "sum": lambda scores, factor: math.fsum(scores),
}
"""Rule -> function that computes a response's score from its members' scores and the rule's factor.
The minimum is the worst case; the mean minus a multiple of the deviation is a softer form of it
(Coste et al. 2024, arXiv:2310.02743, who subtract the variance). The deviation is the population
deviation of the members' scores: with two members and factor 1, the score is the minimum."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_WEIGHT = re.compile(rf"({_NUMBER})\*(.*)", re.DOTALL)
_SCALE = re.compile(rf"(.*)@({_NUMBER})/({_NUMBER})", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """One scorer of an ensemble.

    Attributes:
        scorer: the scorer's name.
        weight: factor on the normalised scores.
        scale: mean and deviation for normalising the scores; None = the scorer's own normaliser.
    """

    scorer: str
    weight: float = 1.0
    scale: tuple[float, float] | None = None


@dataclass(frozen=True)
class EnsembleName:
    """The parsed name of an ensemble.

    Attributes:
        rule: a key of `RULES`.
        members: the members, two or more.
        factor: factor on the deviation.
    """

    rule: str
    members: tuple[Member, ...]
    factor: float = 1.0

    def combine(self, scores: Sequence[float]) -> float:
        """Return the ensemble's score of one response, from the members' normalised scores."""
        weighted = [m.weight * score for m, score in zip(self.members, scores, strict=True)]
        return RULES[self.rule](weighted, self.factor)


def parse_ensemble(name: str) -> EnsembleName | None:
    """Parse the name of an ensemble; None if the name does not begin with a rule.

    Raises:
        UserError: the name begins with a rule, but the rest is malformed.
    """
    if found := re.fullmatch(rf"({'|'.join(RULES)})\s*\((.*)\)", name, re.DOTALL):
        inner = ",".join(part.strip() for part in found.group(2).split(","))
        raise UserError(f"{name}: write an ensemble as {found.group(1)}:{inner}")
    rule, colon, rest = name.partition(":")
    if not colon or rule not in RULES:
        return None
    factor = 1.0
    if rule == "mean_minus_deviation" and (found := re.match(rf"({_NUMBER}):", rest)):
        factor, rest = float(found.group(1)), rest[found.end() :]
        if not 0 <= factor < math.inf:
            raise UserError(f"{name}: the factor {factor:g} must be 0 or more")
    parts = [part.strip() for part in rest.split(",")]
    if len(parts) < 2 or not all(parts):
        raise UserError(
            f"{name}: an ensemble has two or more members, separated by commas, such as "
            f"{rule}:runs/reward-1,runs/reward-2"
        )
    return EnsembleName(rule, tuple(_member(part, rule, name) for part in parts), factor)


def _member(text: str, rule: str, name: str) -> Member:
    scorer, weight, scale = text, 1.0, None
    if found := _WEIGHT.fullmatch(text):
        if rule != "sum":
            raise UserError(
                f"{name}: {text!r} has a weight, which only a sum may have; leave it out, or write "
                "sum:WEIGHT*NAME,..."
            )
        weight, scorer = float(found.group(1)), found.group(2)
    if found := _SCALE.fullmatch(scorer):
        scorer, scale = found.group(1), (float(found.group(2)), float(found.group(3)))
    numbers = (weight, *(scale or ()))
    if not all(map(math.isfinite, numbers)) or (scale and scale[1] <= 0):
        raise UserError(
            f"{name}: the numbers in {text!r} are invalid; write WEIGHT*NAME@MEAN/DEVIATION with a "
            "deviation above 0"
        )
    if scorer.partition(":")[0] in RULES:
        raise UserError(f"{name}: the member {scorer!r} is an ensemble; name its members instead")
    return Member(scorer, weight, scale)


def scorer_names(name: str) -> list[str]:
    """Return the scorers that a name stands for: the members of an ensemble, or else the name
    itself.

    Raises:
        UserError: as in `parse_ensemble`.
    """
    ensemble = parse_ensemble(name)
    return [name] if ensemble is None else [member.scorer for member in ensemble.members]
