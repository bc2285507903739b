"""Measures scorers, as sums over prompts from which intervals can be computed.

A prompt counts once, however many responses it has: its value is the mean over its ordered pairs,
or over its rows. Responses with equal truth form no pair. Pairs with equal scores count half.

- accuracy: of pairs; `accuracy_longer` and `accuracy_shorter` over the pairs in which the better
  response is the longer, or the shorter one, so that a preference for length shows as a gap.
- ties: share of pairs with equal scores.
- best_of_k: whether the response with the highest score is one of the best; if several share the
  highest score, the share of the best among them. With one chosen response, this is the accuracy of
  RewardBench 2 (Malik et al. 2025, arXiv:2506.01937).
- rank_correlation: Spearman's, of rows with three or more responses; equal numbers share their mean
  rank, and a row whose scores are all equal counts 0.
- ece: the expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3) of the
  probability sigmoid(lead) that the response with the higher score is the better one, in bins of
  equal width between 0.5 and 1. Leads are turned into log-odds by `Scorer.logits_per_unit`.
- length_correlation: of scores with lengths in characters, both as deviations from the row's mean,
  so that differences between prompts do not count. `truth_length_correlation` is that of the truth.
- ties_score: the score of RewardBench 2's subset of ties; `subset_mean`: the mean over subsets of
  best_of_k, or of the ties_score, as on its leaderboard.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rrhf.evaluation.bootstrap import Statistic
from rrhf.evaluation.measure import Measure, mean_measure
from rrhf.evaluation.metrics.spec import Column
from rrhf.evaluation.scorers.ranked import RankedSet, by_prompt

COLUMNS: Mapping[str, Column] = {
    "accuracy": Column("accuracy", better="↑"),
    "best_of_k": Column("best of K", better="↑"),
    "rank_correlation": Column("rank correlation", better="↑"),
    "ties": Column("ties", better="↓"),
    "ece": Column("ECE", 3, better="↓"),
    "length_correlation": Column("length corr."),
    "accuracy_longer": Column("acc., better longer", better="↑"),
    "accuracy_shorter": Column("acc., better shorter", better="↑"),
    "subset_mean": Column("mean of subsets", better="↑"),
    "ties_score": Column("ties score", better="↑"),
    "score_mean": Column("score mean", gain=False),
    "score_deviation": Column("score deviation", gain=False),
    "truth_length_correlation": Column("length corr. of the truth", shown=False, gain=False),
}
"""The columns of a scorer's row, in the order of a table."""

TIES_ID = re.compile(r"(ref|tied):(.+)")
"""Ids of RewardBench 2's subset of ties: two rows with the same number belong together."""

_TIES_SUMS = 8

Value = Measure | Statistic


def measures(sets: Sequence[RankedSet], logits_per_unit: float, bins: int) -> dict[str, Value]:
    """Return all measures of a scorer on these rows, by the names of `COLUMNS`."""
    pairs: dict[str, dict[str, list[float]]] = {
        name: {} for name in ("accuracy", "ties", "accuracy_longer", "accuracy_shorter")
    }
    best: dict[str, list[float]] = {}
    ranks: dict[str, list[float]] = {}
    for prompt, rows in by_prompt(sets):
        for row in rows:
            worse, better = row.pairs
            gaps = row.lengths[better] - row.lengths[worse]
            right = row.is_right
            for name, chosen in (
                ("accuracy", right),
                ("ties", row.leads == 0),
                ("accuracy_longer", right[gaps > 0]),
                ("accuracy_shorter", right[gaps < 0]),
            ):
                pairs[name].setdefault(prompt, []).extend(chosen.astype(float).tolist())
            best.setdefault(prompt, []).append(best_of_k(row))
            if len(row.truth) > 2:
                ranks.setdefault(prompt, []).append(rank_correlation(row.truth, row.scores))
    found: dict[str, Value] = {name: mean_measure(values) for name, values in pairs.items()}
    found["best_of_k"] = mean_measure(best)
    found["rank_correlation"] = mean_measure(ranks)
    found["ece"] = calibration_error(sets, logits_per_unit, bins)
    found["length_correlation"] = length_correlation(sets, lambda row: row.scores)
    found["truth_length_correlation"] = length_correlation(sets, lambda row: row.truth)
    found |= of_subsets(sets)
    scores = {prompt: np.concatenate([row.scores for row in rows]) for prompt, rows in _all(sets)}
    sums = {key: (len(x), x.sum(), np.square(x).sum()) for key, x in scores.items() if len(x)}
    found["score_mean"] = Statistic(sums, lambda total: total[:, 1] / total[:, 0])
    found["score_deviation"] = Statistic(sums, _deviation)
    return found


def best_of_k(row: RankedSet) -> float:
    """Return the share of truly best responses among the responses with the highest score."""
    top = row.scores == row.scores.max()
    return float(row.is_best[top].mean())


def rank_correlation(truth: np.ndarray, scores: np.ndarray) -> float:
    """Compute Spearman's correlation of two [K] vectors; 0 if one vector is constant."""
    centred = [_mean_ranks(values) - (len(values) + 1) / 2 for values in (truth, scores)]
    product = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / product if product else 0.0


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return [K] ranks from 1; equal values share the mean of their ranks."""
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    ranks: np.ndarray = below + (equal + 1) / 2
    return ranks


def bin_sums(sets: Sequence[RankedSet], logits_per_unit: float, bins: int) -> dict[str, np.ndarray]:
    """Return for each prompt [3, bins]: shares of its pairs, sums of probability and accuracy."""
    found = {}
    for prompt, rows in by_prompt(sets):
        leads = np.concatenate([row.leads for row in rows]) * logits_per_unit
        right = np.concatenate([row.is_right for row in rows])
        chance = 1 / (1 + np.exp(-np.abs(leads)))
        places = np.minimum(((chance - 0.5) * 2 * bins).astype(int), bins - 1)
        weights = (np.ones_like(chance), chance, right)
        sums = [np.bincount(places, weight, bins) for weight in weights]
        found[prompt] = np.stack(sums) / len(leads)
    return found


def calibration_error(sets: Sequence[RankedSet], logits_per_unit: float, bins: int) -> Statistic:
    """Compute the expected calibration error; see the module's docstring."""

    def value(total: np.ndarray) -> np.ndarray:
        counts, chance, right = np.moveaxis(total.reshape(len(total), 3, bins), 1, 0)
        error: np.ndarray = np.abs(chance - right).sum(-1) / counts.sum(-1)
        return error

    sums = bin_sums(sets, logits_per_unit, bins)
    flat = {prompt: tuple(one.ravel()) for prompt, one in sums.items()}
    return Statistic(flat, value, is_distance=True)


def length_correlation(
    sets: Sequence[RankedSet], values: Callable[[RankedSet], np.ndarray]
) -> Statistic:
    """Correlate [K] values of each row with lengths, within rows; NaN if either is constant."""
    sums: dict[str, tuple[float, ...]] = {}
    for prompt, rows in by_prompt(sets):
        total = np.zeros(3)
        for row in rows:
            x, y = (v - v.mean() for v in (row.lengths, values(row)))
            total += ((x * y).sum(), (x * x).sum(), (y * y).sum())
        sums[prompt] = tuple(total)

    def value(total: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            found: np.ndarray = total[:, 0] / np.sqrt(total[:, 1] * total[:, 2])
        return found

    return Statistic(sums, value)


def of_subsets(sets: Sequence[RankedSet]) -> dict[str, Statistic]:
    """Return `ties_score` if the data has rows of ties, and `subset_mean` if it has subsets."""
    names = sorted({s.subset for s in sets if s.has_order and not TIES_ID.fullmatch(s.id)})
    ties = ties_sums(sets)
    found = {}
    if ties:
        found["ties_score"] = Statistic(ties, ties_value)
    if len(names) + bool(ties) < 2 or not all(names):
        return found
    width = 2 * len(names) + _TIES_SUMS
    sums: dict[str, np.ndarray] = {}
    for prompt, rows in by_prompt([s for s in sets if not TIES_ID.fullmatch(s.id)]):
        sums[prompt] = np.zeros(width)
        for row in rows:
            place = 2 * names.index(row.subset)
            sums[prompt][place : place + 2] += (1, best_of_k(row))
    for number, one in ties.items():
        sums[f"ties {number}"] = np.concatenate([np.zeros(2 * len(names)), one])

    def value(total: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            shares = total[:, 1 : 2 * len(names) : 2] / total[:, 0 : 2 * len(names) : 2]
        parts = [*shares.T, *([ties_value(total[:, 2 * len(names) :])] if ties else [])]
        mean: np.ndarray = np.mean(parts, axis=0)
        return mean

    found["subset_mean"] = Statistic({key: tuple(one) for key, one in sums.items()}, value)
    return found


def ties_sums(sets: Sequence[RankedSet]) -> dict[str, tuple[float, ...]]:
    """Compute the sums from which the ties score is made.

    A number stands for up to two rows: a row with several right answers ("tied") and a row with a
    single right answer ("ref"). The gap of a row is the lowest score of its right answers minus the
    highest score of its wrong answers. Rows of other subsets are left out.

    Returns:
        number -> 8 sums: tied rows; tied rows with a gap above 0; ref rows; ref rows with a gap
        above 0; and, if both rows exist: 1; whether the tied row's gap exceeds the spread of its
        right answers; the same with the smaller gap of both rows; and the surplus of that gap.
    """
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    for s in sets:
        found_id = TIES_ID.fullmatch(s.id)
        if found_id and s.has_order:
            kind, number = found_id.groups()
            right, wrong = s.scores[s.is_best], s.scores[~s.is_best]
            gap, spread = float(right.min() - wrong.max()), float(right.max() - right.min())
            rows.setdefault(number, {})[kind] = (gap, spread)
    found: dict[str, tuple[float, ...]] = {}
    for number, both in rows.items():
        sums = np.zeros(_TIES_SUMS)
        for place, kind in enumerate(("tied", "ref")):
            if kind in both:
                sums[2 * place : 2 * place + 2] = (1, both[kind][0] > 0)
        if len(both) == 2:
            (gap, spread), smaller = both["tied"], min(both["tied"][0], both["ref"][0])
            sums[4:] = (1, gap > spread, smaller > spread, _surplus(smaller, spread))
        found[number] = tuple(sums)
    return found


def _surplus(gap: float, spread: float) -> float:
    """Return tanh(gap / spread - 1); if the spread is 0, the limit for small spreads."""
    return float(np.tanh(gap / spread - 1)) if spread else float(np.sign(gap))


def ties_value(total: np.ndarray) -> np.ndarray:
    """Compute the ties score [rows] from sums [rows, 8].

    The weights are 0.3 for the accuracy of each kind of rows, 0.2 for each of the two comparisons
    of gap and spread, and 0.01 for the surplus; a part without rows counts 0.
    """
    shares = [
        np.divide(total[:, top], total[:, n], out=np.zeros(len(total)), where=total[:, n] > 0)
        for top, n in ((1, 0), (3, 2), (5, 4), (6, 4), (7, 4))
    ]
    value: np.ndarray = np.tensordot([0.3, 0.3, 0.2, 0.2, 0.01], shares, 1)
    return value


def _deviation(total: np.ndarray) -> np.ndarray:
    mean = total[:, 1] / total[:, 0]
    deviation: np.ndarray = np.sqrt(np.maximum(total[:, 2] / total[:, 0] - mean**2, 0))
    return deviation


def _all(sets: Sequence[RankedSet]) -> list[tuple[str, list[RankedSet]]]:
    found: dict[str, list[RankedSet]] = {}
    for s in sets:
        found.setdefault(s.prompt, []).append(s)
    return list(found.items())
