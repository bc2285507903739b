"""Compares methods as if their responses were equally long.

A longer response often wins because it is longer. Two ways to take this out of a comparison:

- **Regression** (`length_controlled`), as in length-controlled AlpacaEval (Dubois et al. 2024,
  arXiv:2404.04475, section 3). For each seed, logit P(win) = theta + phi * tanh(D / sd(D)), where D
  is the length of the method's response minus the opponent's. The length-controlled win rate is
  sigmoid(theta), the prediction for D = 0. Left out: the difficulty of an instruction, which that
  paper estimates from the answers of many models. A weak penalty (the log posterior under normal
  priors of deviation 10) keeps the coefficients finite if a method always wins, or wins whenever
  its response is longer.
- **Matched strata** (`length_matched`): responses of two methods are compared only with responses
  of about the same length. It assumes no form of the effect of length, but compares only where
  the methods' lengths overlap.

If length is part of what makes a response good, both methods remove that part too. They answer a
different question from the plain difference; report them in addition to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rrhf.evaluation.measure import CONFIDENCE
from rrhf.report.two_level import Difference, Estimate, minus, over_estimates

Responses = Mapping[str, Sequence[tuple[float, float]]]
"""Prompt id -> (value, length) of each response. For `length_controlled`, the value is the win
(ties count half), and the length is that of the response minus the opponent's."""

_PENALTY = 0.01
_NEWTON_STEPS = 50


def length_controlled(
    by_seed: Sequence[Responses | None], confidence: float = CONFIDENCE
) -> Difference:
    """Estimate the win rate against an opponent at equal length, 0..1.

    A seed that is None or has no responses counts as missing.
    """
    return over_estimates([_regression(seed) for seed in by_seed], confidence)


def length_controlled_difference(
    by_seed_a: Sequence[Responses | None],
    by_seed_b: Sequence[Responses | None],
    confidence: float = CONFIDENCE,
) -> Difference:
    """Estimate the length-controlled win rate of method a minus that of b, against one opponent."""
    return over_estimates(
        [minus(_regression(a), _regression(b)) for a, b in zip(by_seed_a, by_seed_b, strict=True)],
        confidence,
    )


@dataclass(frozen=True)
class Matched:
    """The difference of two methods at matched lengths.

    Attributes:
        difference: the value of method a minus that of method b.
        overlap: share of responses that have a counterpart, 0..1, averaged over seeds; None if no
            seed has a value.
    """

    difference: Difference
    overlap: float | None


def length_matched(
    by_seed_a: Sequence[Responses | None],
    by_seed_b: Sequence[Responses | None],
    strata: int = 5,
    confidence: float = CONFIDENCE,
) -> Matched:
    """Compare method a with method b within strata of length.

    Within a seed, the lengths of both methods are cut at their quantiles. The weight of a stratum
    is the smaller of the two methods' shares of responses in it, so strata in which one method has
    no response do not count.

    Args:
        by_seed_a, by_seed_b: values of any metric and lengths of the responses; None = missing.
        strata: number of strata; there are fewer if lengths are equal.
        confidence: confidence level of the interval.
    """
    found = [
        _in_strata(a, b, strata) if a and b else None
        for a, b in zip(by_seed_a, by_seed_b, strict=True)
    ]
    shares = [0.0 if one is None else one[2] for one in found]
    return Matched(
        over_estimates([None if one is None else one[:2] for one in found], confidence),
        float(np.mean(shares)) if any(shares) else None,
    )


def against(
    row: Mapping[str, Any], opponent: Mapping[str, Any], win: str = "win_gold"
) -> Responses:
    """Return (win, length difference) by prompt of an evaluation row, for `length_controlled`.

    Rows hold means over a prompt's responses, so each prompt has one entry.

    Args:
        row: the method's row, with wins against a sample of the opponent.
        opponent: the opponent's own row.
        win: "win_gold" or "win_reward".
    """
    wins, ours, theirs = (
        measure["values"]
        for measure in (
            row["per_prompt"][win],
            row["per_prompt"]["length"],
            opponent["per_prompt"]["length"],
        )
    )
    return {p: [(x, ours[p] - theirs[p])] for p, x in wins.items() if p in ours and p in theirs}


def _regression(responses: Responses | None) -> Estimate | None:
    """Return the length-controlled win rate of one seed, and the influence of each prompt."""
    ids, items, weights = _table(responses)
    if not ids:
        return None
    wins, lengths = items.T
    spread = lengths.std()
    control = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    design = np.stack([np.ones_like(control), control], axis=1)
    coefficients = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-design @ coefficients))
        bend = design.T @ (design * (weights * chance * (1 - chance))[:, None])
        bend += _PENALTY * np.eye(2)
        slope = design.T @ (weights * (wins - chance)) - _PENALTY * coefficients
        step = np.linalg.solve(bend, slope)
        coefficients += step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < 1e-10:
            break
    rate = float(1 / (1 + np.exp(-coefficients[0])))
    moved = (design * (weights * (wins - chance))[:, None]) @ np.linalg.inv(bend)[0]
    return rate, _by_prompt(ids, rate * (1 - rate) * moved)


def _in_strata(
    a: Responses, b: Responses, strata: int
) -> tuple[float, dict[str, float], float] | None:
    """Compare one seed; return (difference, influence of each prompt, share of responses with a
    counterpart)."""
    tables = [_table(a), _table(b)]
    lengths = np.concatenate([items[:, 1] for _, items, _ in tables])
    if not all(ids for ids, _, _ in tables):
        return None
    edges = np.unique(np.quantile(lengths, np.arange(1, strata) / strata))
    places = [np.searchsorted(edges, items[:, 1], side="right") for _, items, _ in tables]
    sums = [
        np.bincount(place, weights, len(edges) + 1)
        for place, (_, _, weights) in zip(places, tables, strict=True)
    ]
    shares = np.minimum(*(one / one.sum() for one in sums))
    overlap = float(shares.sum())
    if overlap == 0:
        return None
    difference = 0.0
    influence: dict[str, float] = {}
    for sign, place, one, (ids, items, weights) in zip((1, -1), places, sums, tables, strict=True):
        totals = np.bincount(place, weights * items[:, 0], len(edges) + 1)
        means = np.divide(totals, one, out=np.zeros_like(totals), where=one > 0)
        difference += sign * float(shares @ means) / overlap
        part = sign * shares[place] / overlap * weights / one[place] * (items[:, 0] - means[place])
        for prompt, x in _by_prompt(ids, part).items():
            influence[prompt] = influence.get(prompt, 0.0) + x
    return difference, influence, overlap


def _table(responses: Responses | None) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return prompt ids, (value, length) pairs and weights of all responses; the weights of a
    prompt have sum 1."""
    known = {p: found for p, found in (responses or {}).items() if len(found)}
    ids = [p for p, found in known.items() for _ in found]
    items = np.array([x for found in known.values() for x in found], dtype=np.float64)
    weights = np.array([1 / len(found) for found in known.values() for _ in found])
    return ids, items.reshape(-1, 2), weights


def _by_prompt(ids: Sequence[str], influences: np.ndarray) -> dict[str, float]:
    sums = dict.fromkeys(ids, 0.0)
    for p, x in zip(ids, influences.tolist(), strict=True):
        sums[p] += x
    return sums
