"""Ids of many prompts in little memory: about 30 bytes each, where a dictionary takes 200.

An id is told by 64 bits of its hash. That two different ids of a file share them is expected once
in some 10 million files of a million rows; they would then be taken for one that repeats.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import overload

from rrhf.records import CandidateSet

_FEWEST_SLOTS = 1 << 10
_HEX_DIGITS = 16  # of `rrhf.records.set_id`


class IdTable:
    """Numbers ids in the order of their coming."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._slots = array("I", bytes(4 * _FEWEST_SLOTS))  # number + 1; 0 = free
        self._mask = _FEWEST_SLOTS - 1

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, given_id: Hashable) -> bool:
        return self.find(given_id) is not None

    def find(self, given_id: Hashable) -> int | None:
        """The number of an id; None where it has not come."""
        hashed = hash(given_id)
        slots, hashes, mask = self._slots, self._hashes, self._mask
        place = hashed & mask
        while number := slots[place]:
            if hashes[number - 1] == hashed:
                return number - 1
            place = (place + 1) & mask
        return None

    def add(self, given_id: Hashable) -> bool:
        """Number an id; False where it has a number already."""
        hashed = hash(given_id)
        slots, hashes, mask = self._slots, self._hashes, self._mask
        place = hashed & mask
        while number := slots[place]:
            if hashes[number - 1] == hashed:
                return False
            place = (place + 1) & mask
        hashes.append(hashed)
        slots[place] = len(hashes)
        if 2 * len(hashes) > mask:
            self._grow()
        return True

    def _grow(self) -> None:
        mask = self._mask = 4 * len(self._slots) - 1
        slots = self._slots = array("I", bytes(4 * (mask + 1)))
        for number, hashed in enumerate(self._hashes, start=1):
            place = hashed & mask
            while slots[place]:
                place = (place + 1) & mask
            slots[place] = number


class IdList(Sequence[str]):
    """Ids by number: 8 bytes each for those that a prompt gives, the text of any other."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._numbers = array("Q")
        self._texts: dict[int, str] = {}
        for one in ids:
            self.append(one)

    def append(self, given_id: str) -> None:
        number = _as_number(given_id)
        if number is None:
            self._texts[len(self._numbers)] = given_id
        self._numbers.append(number or 0)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        number = self._numbers[index]
        if number == 0 and self._texts:
            place = range(len(self))[index]
            if place in self._texts:
                return self._texts[place]
        return f"{number:016x}"


def _as_number(given_id: str) -> int | None:
    """The number that 16 hex digits stand for; None of any other text."""
    if len(given_id) != _HEX_DIGITS:
        return None
    try:
        number = int(given_id, 16)
    except ValueError:
        return None
    return number if f"{number:016x}" == given_id else None


class SeenIds:
    """The ids of a file so far, so that each row gets one of its own."""

    def __init__(self) -> None:
        self._seen = IdTable()
        self._times: dict[str, int] = {}  # of those that came more than once

    def give(self, candidate_set: CandidateSet) -> CandidateSet:
        """The set, with an occurrence number in its id ("-1", "-2", ...) if it has been seen."""
        base = candidate_set.id
        if self._seen.add(base):
            return candidate_set
        times = self._times.get(base, 1)
        while not self._seen.add(fresh := f"{base}-{times}"):
            times += 1
        self._times[base] = times + 1
        return replace(candidate_set, id=fresh)

    def __contains__(self, given_id: str) -> bool:
        return given_id in self._seen

    def __len__(self) -> int:
        return len(self._seen)
