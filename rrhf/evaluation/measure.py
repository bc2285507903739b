"""Values of a metric by prompt, from which means, intervals and differences are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Defaults of bootstrap intervals: the confidence level and the number of resamples."""

MAX_UNSCORED_FRACTION = 0.01
"""Default of the share of responses on which a scorer may fail."""

Scale = Literal["mean", "exp"]


@dataclass(frozen=True)
class Measure:
    """A metric's values by prompt.

    The metric is f(sum of values / sum of weights); f is the identity or exp.

    Attributes:
        values: prompt id -> the mean value of the prompt's responses, or the sum of their nats.
        weights: prompt id -> weight, such as a number of tokens; None = each prompt counts once.
        scale: "exp" for a perplexity.
    """

    values: Mapping[str, float]
    weights: Mapping[str, float] | None = None
    scale: Scale = "mean"

    @property
    def prompt_ids(self) -> list[str]:
        """Ids of the prompts with a weight above 0."""
        if self.weights is None:
            return list(self.values)
        return [i for i in self.values if self.weights[i] > 0]


def mean_measure(values: Mapping[str, Sequence[float | None]]) -> Measure:
    """Average the values of each prompt; values that are None, and prompts without other values,
    are left out."""
    known = {key: [x for x in found if x is not None] for key, found in values.items()}
    return Measure({key: sum(found) / len(found) for key, found in known.items() if found})
