"""The interface of every source of preference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from rrhf.records import Candidate, CandidateSet


class Scorer(Protocol):
    """Gives each candidate a score; higher is better.

    Sets arrive grouped, so that a prompt can be computed once. A scorer sees text, messages and
    `finish_reason`, and applies its own tokenizer and template.

    Attributes:
        name: for manifests and tables, such as "reward_model:<folder>".
        normalized: True if scores were normalised (mean 0, deviation 1 on the training data).
    """

    name: str
    normalized: bool

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """A list for each set, a score for each candidate, in order; None = could not be scored."""
        ...


@runtime_checkable
class LocalScorer(Scorer, Protocol):
    """A scorer whose model runs in this process.

    Attributes:
        model: the frozen module; its weights may be offloaded between two calls of `score`.
    """

    model: Any


@runtime_checkable
class WindowedScorer(Scorer, Protocol):
    """One that reads only so many tokens, and leaves out what exceeds them.

    Attributes:
        window: tokens of prompt and response together.
    """

    window: int

    def fits(self, s: CandidateSet, candidate: Candidate) -> bool:
        """Whether the response fits behind at least the prompt's last turn."""
        ...


def is_too_long(scorer: Scorer, s: CandidateSet, candidate: Candidate) -> bool:
    """Whether a candidate has no score because it exceeds the window: no fault of the scorer."""
    return isinstance(scorer, WindowedScorer) and not scorer.fits(s, candidate)
