"""Joins responses whose order is known with the scores that a scorer gave them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rrhf.records import CandidateSet, set_id


@dataclass(frozen=True)
class RankedSet:
    """The scored responses of one prompt, with their true ranking.

    Attributes:
        id: id of the row.
        prompt: id of the prompt, which rows with the same prompt share.
        subset: the part of the data that the row comes from; "" if unknown.
        truth: [K] numbers by which the responses are ranked; only their order counts.
        scores: [K] scores by the scorer.
        lengths: [K] characters of the responses.
    """

    id: str
    prompt: str
    subset: str
    truth: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, ranked: CandidateSet, scored: CandidateSet) -> RankedSet:
        """Combine a set with the truth and a set with the scores; leave out None scores."""
        known = [
            (theirs.score, ours.score, len(ours.response))
            for theirs, ours in zip(ranked.candidates, scored.candidates, strict=True)
            if theirs.score is not None and ours.score is not None
        ]
        columns = np.array(known, dtype=np.float64).reshape(-1, 3).T
        prompt = set_id(ranked.query, ranked.messages)
        return cls(ranked.id, prompt, ranked.origin, *columns)

    @property
    def has_order(self) -> bool:
        """Whether one response is better than another."""
        return bool(len(self.truth)) and bool(self.truth.min() < self.truth.max())

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """([M], [M]) places of the worse and the better response of every ordered pair."""
        worse, better = np.nonzero(self.truth[:, None] < self.truth[None, :])
        return worse, better

    @property
    def leads(self) -> np.ndarray:
        """[M] score of the better response minus that of the worse, for every pair."""
        worse, better = self.pairs
        return self.scores[better] - self.scores[worse]

    @property
    def is_right(self) -> np.ndarray:
        """[M] 1 where the better response scores higher, 1/2 where both score alike, else 0."""
        return (np.sign(self.leads) + 1) / 2

    @property
    def is_best(self) -> np.ndarray:
        """[K] which responses are among the truly best."""
        return self.truth == self.truth.max()


def by_prompt(sets: Sequence[RankedSet]) -> Iterator[tuple[str, list[RankedSet]]]:
    """Group the rows that have an order by prompt, in the order of the data."""
    found: dict[str, list[RankedSet]] = {}
    for s in sets:
        if s.has_order:
            found.setdefault(s.prompt, []).append(s)
    yield from found.items()
