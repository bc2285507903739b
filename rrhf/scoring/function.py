"""Scores from a Python function of the user's: `module:function`.

    def score(prompts, responses, messages): -> one number for each response, or None

Three lists of equal length, an entry a response: the prompt as text, the response as text, and the
conversation as a list of {"role", "content"} (None where only text is known). None and NaN mean
"could not be scored". Anything else that is not a number is the function's mistake, and told, as is
whatever the function or its module raises: to leave the program (`sys.exit`) is no way to end well.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.user_code import (
    NOT_ITS_OWN,
    importable,
    load_function,
    place_of,
    shown,
    told_error,
)

logger = logging.getLogger(__name__)

# These can be gone through, but what comes out are keys, in any order, or bytes.
NO_LISTS = (Mapping, Set, str, bytes, bytearray, memoryview)


class FunctionScorer:
    """Calls a function once for all candidates that it is given.

    Args:
        target: "module:function"; the module is looked for in the current folder too.

    Attributes:
        name, normalized: as `rrhf.scoring.scorer.Scorer`.
        unscored: why candidates got None, counted.

    Raises:
        UserError: no such module or function.
    """

    normalized = False

    def __init__(self, target: str) -> None:
        self._folder = str(Path.cwd())
        self._function = load_function(target)
        self._require_three_arguments(target)
        self.name = f"function:{target}"
        self.unscored: Counter[str] = Counter()

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Scores in order; None where the function gave None, NaN or an infinity.

        Raises:
            UserError: the function raised, or gave another number of results, or a result that is
                no number.
        """
        prompts, responses, messages = [], [], []
        for s in sets:
            turns = None
            if s.messages is not None:
                turns = [{"role": m.role, "content": m.content} for m in s.messages]
            for candidate in s.candidates:
                prompts.append(s.query)
                responses.append(candidate.response)
                messages.append(turns)
        wanted = len(prompts)  # the function may change its lists
        found = self._validated(self._called(wanted, prompts, responses, messages), wanted)
        results = iter(found)
        return [[next(results) for _ in s.candidates] for s in sets]

    def _require_three_arguments(self, target: str) -> None:
        try:
            inspect.signature(self._function).bind([], [], [])
        except ValueError:  # some built-in functions do not tell
            return
        except TypeError as error:
            raise UserError(
                f"function:{target}: cannot be called with (prompts, responses, messages): "
                f"{error}; give it these three parameters"
            ) from None

    def _called(self, wanted: int, *arguments: Any) -> list[Any]:
        """What the function returned, as a list; a generator runs here, so it may raise here.

        Of one that may have no end, at most one result too many is taken.
        """
        try:
            with importable(self._folder):
                found = self._function(*arguments)
                results = None
                if hasattr(found, "__iter__") and not isinstance(found, NO_LISTS):
                    results = found if hasattr(found, "__len__") else islice(found, wanted + 1)
                values = [] if results is None else list(results)
        except NOT_ITS_OWN:
            raise
        except SystemExit as error:
            raise UserError(
                f"{self.name}: called sys.exit({shown(error.code)}) ({place_of(error)}); it must "
                "return its scores, and None where a response cannot be scored"
            ) from error
        except BaseException as error:
            raise UserError(
                f"{self.name}: raised {told_error(error)}; fix it, or let it return None "
                "where a response cannot be scored"
            ) from error
        if results is None:
            raise UserError(
                f"{self.name}: returned {shown(found)}; it must return a list of numbers, one for "
                "each response, in order"
            )
        return values

    def _validated(self, values: list[Any], wanted: int) -> list[float | None]:
        if len(values) != wanted:
            number = str(len(values)) if len(values) < wanted else f"more than {wanted}"
            raise UserError(
                f"{self.name}: returned {number} results for {wanted} responses; it must "
                "return one for each, in order"
            )
        return [self._number(value, place) for place, value in enumerate(values)]

    def _number(self, value: Any, place: int) -> float | None:
        if value is None:
            self._count("function_gave_none", place)
            return None
        if isinstance(value, (str, bytes)):
            raise self._no_number(value, place)
        try:
            number = float(value)
        except NOT_ITS_OWN:
            raise
        except OverflowError:
            raise UserError(
                f"{self.name}: result {place} is {shown(value)}, too large for a floating-point "
                "number; return a smaller one, or None where a response cannot be scored"
            ) from None
        except BaseException:
            raise self._no_number(value, place) from None
        if not math.isfinite(number):
            self._count("score_not_finite", place)
            return None
        return number

    def _no_number(self, value: Any, place: int) -> UserError:
        return UserError(
            f"{self.name}: result {place} is {shown(value)}, no number; return a number, or None "
            "where a response cannot be scored"
        )

    def _count(self, reason: str, place: int) -> None:
        if not self.unscored[reason]:
            logger.warning("%s: %s (first: result %d)", self.name, reason.replace("_", " "), place)
        self.unscored[reason] += 1
