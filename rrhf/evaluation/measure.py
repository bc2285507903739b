"""A metric's values by prompt: all that a mean, an interval or a paired difference needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rrhf.records import Candidate, CandidateSet

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Of intervals, unless told otherwise."""

Scale = Literal["mean", "exp"]


@dataclass(frozen=True)
class Measure:
    """A metric's values by prompt.

    The metric is f(sum of values / sum of weights), f the identity or exp.

    Attributes:
        values: prompt id -> value: a prompt's mean over its responses, or nats in it.
        weights: prompt id -> weight, such as its tokens; None = every prompt counts once.
        scale: "exp" for a perplexity.
    """

    values: Mapping[str, float]
    weights: Mapping[str, float] | None = None
    scale: Scale = "mean"

    @property
    def prompt_ids(self) -> list[str]:
        """The prompts with a weight above 0, in order."""
        if self.weights is None:
            return list(self.values)
        return [i for i in self.values if self.weights[i] > 0]


def candidate_mean(
    sets: Sequence[CandidateSet], value: Callable[[CandidateSet, Candidate], float]
) -> Measure:
    """The mean of something over a prompt's candidates; prompts without any are left out."""
    return Measure(
        {
            s.id: sum(value(s, c) for c in s.candidates) / len(s.candidates)
            for s in sets
            if s.candidates
        }
    )
