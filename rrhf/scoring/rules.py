"""Scores by rules that need no model: the length of a response, and how much it repeats itself.

They are meant as members of an ensemble: `sum:runs/reward,0.5*length:20-80@0/1,2*repetition:3@0/1`.
A word is what stands between blanks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.scoring.scorer import Scorer

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class LengthScorer(Scorer):
    """The scorer `length:WORDS` or `length:LOW-HIGH`: minus the distance to the wanted length.

    With n words, the score is -max(LOW - n, n - HIGH, 0) / HIGH: 0 within the range, -1 for an
    empty response if LOW = HIGH, and for one that exceeds HIGH by as many words again.

    Args:
        target: the wanted number of words, or the lowest and the highest.

    Raises:
        UserError: it is neither.
    """

    def __init__(self, target: str) -> None:
        self.name = f"length:{target}"
        found = _RANGE.fullmatch(target)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 0 <= low <= high or not high:
            raise UserError(
                f"{self.name}: is no length in words; write length:50, or length:20-80 for a range"
            )
        self._low, self._high = low, high

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Return the scores, in order."""
        return [[self._of(len(c.response.split())) for c in s.candidates] for s in sets]

    def _of(self, words: int) -> float:
        return 0.0 - max(self._low - words, words - self._high, 0) / self._high


class RepetitionScorer(Scorer):
    """The scorer `repetition:N`: minus the share of runs of N words that occurred before.

    The score is distinct / all - 1 over the runs of N words of a response, upper and lower case
    alike: 0 if none is repeated, or if the response has fewer than N words; close to -1 for a loop.

    Args:
        target: N.

    Raises:
        UserError: it is not a whole number of 1 or more.
    """

    def __init__(self, target: str) -> None:
        self.name = f"repetition:{target}"
        if not target.isdecimal() or not int(target):
            raise UserError(
                f"{self.name}: write the number of words in a run, such as repetition:3"
            )
        self._size = int(target)

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Return the scores, in order."""
        return [[self._of(c.response.casefold().split()) for c in s.candidates] for s in sets]

    def _of(self, words: Sequence[str]) -> float:
        runs = list(zip(*(words[start:] for start in range(self._size)), strict=False))
        return len(set(runs)) / len(runs) - 1 if runs else 0.0
