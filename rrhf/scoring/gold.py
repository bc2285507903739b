"""The true preference of a world as a scorer; a prompt of another world gets no score."""

from __future__ import annotations

from collections.abc import Sequence

from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.scoring.scorer import Scorer
from rrhf.worlds import WORLDS, gold_of, make_world


class GoldScorer(Scorer):
    """The scorer `gold:NAME`, for any size and seed of a world.

    Args:
        target: name or import path of the world, as `rrhf.worlds.make_world` takes it.

    Raises:
        UserError: no such world.
    """

    def __init__(self, target: str) -> None:
        if target not in WORLDS and ":" not in target:
            known = ", ".join(f"gold:{name}" for name in WORLDS)
            raise UserError(
                f"gold:{target}: there is no such world; choose one of {known}, or name your own "
                "world as gold:package.module:name"
            )
        self.name = f"gold:{target}"
        self._world = make_world(target)

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Scores in order."""
        return [[gold_of(self._world, s, candidate) for candidate in s.candidates] for s in sets]
