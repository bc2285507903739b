"""Corrects win rates that an imperfect judge measured, by what the judge gets wrong.

A judge prefers a truly better response with probability *sensitivity*, and rejects a truly worse
one with probability *specificity*. The share p of comparisons that a method wins according to the
judge is therefore not the true win rate theta, but p = theta * sensitivity + (1 - theta) * (1 -
specificity). With both probabilities measured on calibration items, whose truth is known,

    theta = (p + specificity - 1) / (sensitivity + specificity - 1)

(Rogan and Gladen 1978, doi:10.1093/oxfordjournals.aje.a112510; for language models as judges, Lee
et al. 2025, arXiv:2511.21140).

**Ties.** A verdict is a number: 1 for a win, 0 for a loss, 1/2 for a tie, such as a pair on which
the judge contradicts itself when the order is swapped. Sensitivity is the mean verdict where the
method is truly better, specificity is 1 minus the mean verdict where it is truly worse. A true tie
counts as half a win in theta; it is assumed to get the mean of both verdicts. Calibration items
whose truth is a tie are left out.

**Interval.** All theta for which |p - (1 - theta) * (1 - specificity) - theta * sensitivity| is at
most z times its standard error, to which the evaluated and the calibration items contribute
(Fieller 1954). Unlike an error of theta by linearisation (the delta method), this is valid for weak
judges too: if a judge cannot be distinguished from chance, the interval is 0..1. Each mean is
computed with z^2/2 added wins and as many losses (Agresti and Coull 1998,
doi:10.1080/00031305.1998.10480550; one of each for the calibration, as in arXiv:2511.21140), so
that unanimous verdicts have an error too.

**Limit.** The judge must make the same mistakes on both kinds of items. Calibrate it on responses
of the same kinds, and on prompts that are not evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from rrhf.errors import UserError
from rrhf.evaluation.measure import CONFIDENCE


@dataclass(frozen=True)
class Share:
    """A mean of verdicts, with its estimate and variance for an interval.

    Attributes:
        mean: the plain mean.
        count: number of items.
        centre: the mean with added wins and losses.
        variance: the variance of `centre`.
    """

    mean: float
    count: int
    centre: float
    variance: float

    @classmethod
    def of(cls, verdicts: Sequence[float], added: float) -> Share:
        """Average verdicts, one or more, 0..1; `added` = number of wins, and of losses, to add."""
        assert verdicts, "a mean of no verdicts is not defined"
        assert all(0 <= verdict <= 1 for verdict in verdicts), "verdicts are in 0..1"
        count, total = len(verdicts), math.fsum(verdicts)
        size = count + 2 * added
        centre = (total + added) / size
        squares = (math.fsum(verdict * verdict for verdict in verdicts) + added) / size
        return cls(total / count, count, centre, (squares - centre * centre) / size)


@dataclass(frozen=True)
class Calibration:
    """What a judge gets right, measured on items whose truth is known.

    Attributes:
        better: verdicts where the method is truly better; the mean is the sensitivity.
        worse: verdicts where it is truly worse; 1 minus the mean is the specificity. None = the
            items have no side, so that every mistake is one in both directions: specificity equals
            sensitivity.
        ties: number of items that were left out because their truth is a tie.
    """

    better: Share
    worse: Share | None
    ties: int = 0

    @property
    def sensitivity(self) -> float:
        return self.better.mean

    @property
    def specificity(self) -> float:
        return self.better.mean if self.worse is None else 1 - self.worse.mean

    def require_better_than_chance(self) -> None:
        """Refuse a judge that is right no more often than chance.

        Raises:
            UserError: sensitivity + specificity is 1 or less.
        """
        if self.sensitivity + self.specificity <= 1 + 1e-9:
            raise UserError(
                f"the judge has sensitivity {self.sensitivity:.3f} and specificity "
                f"{self.specificity:.3f} on the calibration items: together no more than 1, as by "
                "chance, so its verdicts say nothing about the true win rate; use a better judge"
            )


def calibrate(verdicts: Sequence[float], truth: Sequence[float]) -> Calibration:
    """Measure a judge on comparisons of a method with its opponent.

    Args:
        verdicts: for each item, 1 = the judge says that the method wins, 0 = loses, 1/2 = tie; or
            the mean over the samples of one prompt.
        truth: for each item, the true result in the same form; items strictly between 0 and 1 are
            left out.

    Raises:
        UserError: there is no item in which the method truly wins, or none in which it loses.
    """
    both = list(zip(verdicts, truth, strict=True))
    better = [verdict for verdict, true in both if true == 1]
    worse = [verdict for verdict, true in both if true == 0]
    for kind, found in (("better", better), ("worse", worse)):
        if not found:
            raise UserError(
                f"in none of {len(both)} calibration items is the method truly {kind}, so the "
                "judge's mistakes cannot be measured; add such items"
            )
    ties = len(both) - len(better) - len(worse)
    return Calibration(Share.of(better, 1), Share.of(worse, 1), ties)


def calibrate_pairs(is_right: Sequence[float]) -> Calibration:
    """Measure a judge on pairs in which one response is truly better; no side is the method's.

    Args:
        is_right: for each item, 1 = the judge finds the better response better, 0 = worse, 1/2 = a
            tie; or the mean over the pairs of one prompt.

    Raises:
        UserError: there is no item.
    """
    if not is_right:
        raise UserError(
            "there is no calibration item, so the judge's mistakes cannot be measured; add pairs "
            "of which one response is known to be better"
        )
    return Calibration(Share.of(is_right, 1), None)


@dataclass(frozen=True)
class Corrected:
    """A corrected win rate.

    Attributes:
        mean: the corrected win rate, 0..1.
        low, high: ends of the interval.
        n: number of evaluated items.
        judged: the win rate by the judge, uncorrected.
        sensitivity, specificity: those of the judge on the calibration items.
        calibration_items: number of calibration items, without true ties.
        calibration_ties: number of true ties, which were left out.
    """

    mean: float
    low: float
    high: float
    n: int
    judged: float
    sensitivity: float
    specificity: float
    calibration_items: int
    calibration_ties: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def corrected_win_rate(
    verdicts: Sequence[float], calibration: Calibration, confidence: float = CONFIDENCE
) -> Corrected:
    """Correct a win rate; see the module's docstring.

    Args:
        verdicts: for each evaluated item, as in `calibrate`.
        calibration: the judge's mistakes.
        confidence: confidence level of the interval.

    Raises:
        UserError: there is no verdict, or the judge is no better than chance.
    """
    if not verdicts:
        raise UserError("there is no verdict to correct; the judge scored no comparison")
    calibration.require_better_than_chance()
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    judged = Share.of(verdicts, z * z / 2)
    sensitivity, specificity = calibration.sensitivity, calibration.specificity
    mean = (judged.mean + specificity - 1) / (sensitivity + specificity - 1)
    mean = min(max(mean, 0.0), 1.0)
    low, high = _interval(judged, calibration, z)
    better, worse = calibration.better, calibration.worse
    return Corrected(
        mean,
        min(low, mean),
        max(high, mean),
        judged.count,
        judged.mean,
        sensitivity,
        specificity,
        better.count + (0 if worse is None else worse.count),
        calibration.ties,
    )


def _interval(judged: Share, calibration: Calibration, z: float) -> tuple[float, float]:
    """Solve (c - d * theta)^2 <= z^2 * (v0 + v1 * theta + v2 * theta^2) for theta in 0..1.

    c - d * theta is p - (1 - theta) * (1 - specificity) - theta * sensitivity.
    """
    better, worse = calibration.better, calibration.worse
    if worse is None:  # specificity = sensitivity: the error's factor is 1 - 2 * theta
        c, d = judged.centre + better.centre - 1, 2 * better.centre - 1
        v0, v1, v2 = judged.variance + better.variance, -4 * better.variance, 4 * better.variance
    else:
        c, d = judged.centre - worse.centre, better.centre - worse.centre
        v0, v1 = judged.variance + worse.variance, -2 * worse.variance
        v2 = better.variance + worse.variance
    square, linear, constant = d * d - z * z * v2, 2 * c * d + z * z * v1, c * c - z * z * v0
    root = linear * linear - 4 * square * constant
    if square <= 0 or root < 0:  # the judge cannot be told from chance
        return 0.0, 1.0
    ends = [(linear + sign * math.sqrt(root)) / (2 * square) for sign in (-1, 1)]
    low, high = (min(max(end, 0.0), 1.0) for end in ends)
    return low, high
