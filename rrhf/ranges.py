"""The range of each numeric setting: a table per class of settings, checked when it is built.

A range is written as in mathematics: "[0, 1)" holds 0 and everything below 1. Every number of a
configuration must be finite, in the table or not: an infinite rate makes infinite weights, and NaN
passes every comparison. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rrhf.errors import UserError

COUNT, INDEX = "[1, inf)", "[0, inf)"
"""The range of counts that must be at least one, and of those that may be zero."""
NOT_NEGATIVE, POSITIVE, SHARE, BELOW_ONE = "[0, inf)", "(0, inf)", "[0, 1]", "[0, 1)"
SEED = "[-4611686018427387904, 4611686018427387904]"
"""2 ** 62 either way: seeds are added to, and torch takes 64 bits."""

_FORM = re.compile(r"([\[(])(\S+), (\S+)([\])])")


@dataclass(frozen=True)
class Interval:
    """The numbers from `least` to `most`.

    Attributes:
        least, most: its ends; -inf or inf if unbounded.
        holds_least, holds_most: whether the ends belong to it.
    """

    least: float
    most: float
    holds_least: bool
    holds_most: bool

    @classmethod
    def parse(cls, text: str) -> Interval:
        """Parse a text such as "(0, 1]"."""
        found = _FORM.fullmatch(text)
        assert found is not None, f"{text!r} is no interval such as '[0, 1)'"
        left, least, most, right = found.groups()
        return cls(_number(least), _number(most), left == "[", right == "]")

    def __contains__(self, value: float) -> bool:
        is_above = value >= self.least if self.holds_least else value > self.least
        return is_above and (value <= self.most if self.holds_most else value < self.most)

    def __str__(self) -> str:
        """In words, to follow "must be" in a message."""
        low = f"{self.least} or more" if self.holds_least else f"above {self.least}"
        high = f"at most {self.most}" if self.holds_most else f"below {self.most}"
        if self.most == math.inf:
            return low
        if self.holds_least and self.holds_most:
            return f"between {self.least} and {self.most}"
        return f"{low} and {high}"


def check_ranges(config: Any, ranges: Mapping[str, str]) -> None:
    """Refuse numbers that are not finite or out of their range; None is allowed.

    Args:
        config: a dataclass; its fields that are not in the table must be finite.
        ranges: field -> range; a single number outside the interval comes first: "-1 or [1, inf)".

    Raises:
        UserError: one is.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{item.name} {value}: must be a finite number")
        wanted = ranges.get(item.name)
        if wanted is None:
            continue
        *alone, interval = wanted.split(" or ")
        if value not in Interval.parse(interval) and value not in map(_number, alone):
            words = " or ".join([*alone, str(Interval.parse(interval))])
            raise UserError(f"--{item.name} {value}: must be {words}")


def _number(text: str) -> float:
    """Keeps integers as integers: 2 ** 62 and its neighbours are the same float."""
    return int(text) if text.lstrip("-").isdigit() else float(text)
