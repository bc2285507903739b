"""The user's own scorer, `package.module:name`: builds it and checks its results."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from rrhf.errors import UserError
from rrhf.records import Candidate, CandidateSet
from rrhf.scoring.checked import CheckedScorer
from rrhf.scoring.scorer import Scorer, ScorerMaker
from rrhf.user_code import guarded


class OwnScorer(CheckedScorer):
    """Wraps the user's scorer.

    Args:
        spec: the import path.
        maker: the class or function that the path names.
        offered: `options` and `device`, which are passed on if `maker` has parameters of these
            names.

    Raises:
        UserError: the scorer cannot be made, or is not a `Scorer`.
    """

    def __init__(self, spec: str, maker: ScorerMaker, **offered: Any) -> None:
        super().__init__(spec, "scorer")
        given = _given(spec, maker, offered)
        with guarded(f"{spec}({', '.join(given)})"):
            own = maker(**given)
        if not isinstance(own, Scorer):
            raise UserError(
                f"{spec}: makes a {type(own).__name__}, not a scorer; derive the class from "
                "rrhf.scoring.scorer.Scorer"
            )
        self._own = own
        self.name = own.name or spec
        self.normalized, self.quantity, self.unit = own.normalized, own.quantity, own.unit
        self.window, self.model = own.window, own.model
        self.logits_per_unit, self.is_relative = own.logits_per_unit, own.is_relative
        with guarded(f"{spec}: describe()", "let it return a dict that JSON can hold"):
            json.dumps(dict(own.describe()))

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Return the scores, in order; None where the scorer returned None, NaN or an infinity.

        Raises:
            UserError: the scorer raised, or did not return a number or None for each candidate.
        """
        rows = self._listed(
            lambda: map(list, self._own.score(sets)),
            "a list for each set, with a score for each candidate",
            len(sets),
        )
        found, wanted = [len(row) for row in rows], [len(s.candidates) for s in sets]
        if found != wanted:
            raise UserError(
                f"{self.name}: returned lists of {_begin(found)} scores for sets of "
                f"{_begin(wanted)} candidates; it must return a list for each set, with a score "
                "for each candidate"
            )
        results = iter(self._numbers([value for row in rows for value in row]))
        return [[next(results) for _ in s.candidates] for s in sets]

    def describe(self) -> dict[str, Any]:
        """Describe the scorer for manifests."""
        return super().describe() | self._own.describe() | {"name": self.name}

    def fits(self, s: CandidateSet, candidate: Candidate) -> bool:
        """Whether a candidate fits, according to the user's scorer."""
        return self._own.fits(s, candidate)


def require_maker(spec: str, maker: ScorerMaker) -> None:
    """Check that a scorer can be built, without building it.

    Raises:
        UserError: the scorer has required parameters other than `options` and `device`.
    """
    _given(spec, maker, {"options": None, "device": None})


def _given(spec: str, maker: ScorerMaker, offered: dict[str, Any]) -> dict[str, Any]:
    try:
        signature = inspect.signature(maker)
    except ValueError:  # some built-in classes have no signature
        return {}
    given = {name: value for name, value in offered.items() if name in signature.parameters}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise UserError(
            f"{spec}: cannot be made: {error}. The class may have the parameters `options` and "
            f"`device`; any other parameter needs a default. For a function that returns scores, "
            f"write function:{spec}"
        ) from None
    return given


def _begin(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:5])) + (", ..." if len(sizes) > 5 else "")
