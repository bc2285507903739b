"""The results of a study as numbers: every method over its seeds, and its paired differences.

A `Series` is one method: a row for each seed, or None where the method was not trained. Means and
differences have intervals over seeds and prompts (`rrhf.report.two_level`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rrhf.report.length_control import against, length_controlled
from rrhf.report.training_cost import TrainingCost
from rrhf.report.two_level import Difference, mean_over_seeds, paired

Row = Mapping[str, Any]
METRICS = ("gold", "win_gold", "reward", "kl", "length", "ppl_reference")


@dataclass(frozen=True)
class Series:
    """One method over the seeds of a study.

    Attributes:
        title: the method's name.
        rows: the method's row for each seed; None = not trained on this seed.
        cost: mean cost of the method's training.
        curves: for each seed the rows from SFT to the last policy; empty without a curve.
    """

    title: str
    rows: Sequence[Row | None]
    cost: TrainingCost
    curves: Sequence[Sequence[Row] | None] = ()

    def values(self, metric: str = "gold") -> list[dict[str, float] | None]:
        """Return for each seed the metric's value for each prompt."""
        return [None if row is None else row["per_prompt"][metric]["values"] for row in self.rows]

    def means(self, metric: str = "gold") -> list[float | None]:
        """Return the metric on each seed; None where it was not measured."""
        rows = (row["metrics"] if row else {} for row in self.rows)
        return [metrics.get(metric, {}).get("mean") for metrics in rows]

    def mean(self, metric: str) -> Difference:
        """Average a metric over seeds and prompts; a ratio, such as a perplexity, over seeds
        only."""
        known = [row for row in self.rows if row is not None]
        measures = [row["per_prompt"].get(metric, {"weights": {}}) for row in known]
        if any("weights" in measure for measure in measures):
            means = [None if x is None else {"": x} for x in self.means(metric)]
            return mean_over_seeds(means)
        return mean_over_seeds(self.values(metric))

    def minus(self, other: Series) -> Difference:
        """Return gold minus the gold of another method, paired by seed and prompt."""
        return paired(self.values(), other.values())

    def win_at_equal_length(self, opponent: Series) -> Difference:
        """The rate of wins against the opponent by gold, as if responses were equally long."""
        return length_controlled(
            [
                None if row is None or other is None else against(row, other)
                for row, other in zip(self.rows, opponent.rows, strict=True)
            ]
        )


def spread(values: Sequence[float | None]) -> float | None:
    """Compute the standard deviation over seeds; None for fewer than two seeds."""
    known = [x for x in values if x is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def numbers(series: Mapping[str, Series], against: Sequence[str]) -> dict[str, Any]:
    """Return everything that the tables show, as JSON values.

    Args:
        series: key of a method -> its results by seed.
        against: keys of the methods that all others are compared with.
    """
    found: dict[str, Any] = {}
    for key, one in series.items():
        row = next(row for row in one.rows if row is not None)
        found[key] = {
            "title": one.title,
            "cost": one.cost.as_dict(),
            **{m: one.mean(m).as_dict() for m in METRICS if m in row["metrics"]},
            "win_at_equal_length": one.win_at_equal_length(series["sft"]).as_dict(),
            "gold_by_seed": one.means(),
            "gold_minus": {
                other: one.minus(series[other]).as_dict() for other in against if other != key
            },
        }
    return found


def axis_numbers(series: Mapping[str, Mapping[str, Series]]) -> dict[str, Any]:
    """Return value -> method -> gold, reward and KL as JSON values."""
    return {
        value: {
            key: {
                **{metric: one.mean(metric).as_dict() for metric in ("gold", "reward", "kl")},
                "gold_by_seed": one.means(),
            }
            for key, one in of_value.items()
        }
        for value, of_value in series.items()
    }
