"""Scores from a Python function of the user's: `module:function`.

    def score(prompts, responses, messages): -> one number for each response, or None

Three lists of equal length, an entry a response: the prompt as text, the response as text, and the
conversation as a list of {"role", "content"} (None where only text is known). None and NaN mean
"could not be scored". Anything else that is not a number is the function's mistake, and told.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.records import CandidateSet

logger = logging.getLogger(__name__)


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
        found = self._called(prompts, responses, messages)
        results = iter(self._validated(found, len(prompts)))
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

    def _called(self, *arguments: Any) -> Any:
        try:
            return self._function(*arguments)
        except UserError:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{self.name}: raised {type(error).__name__}: {error} ({where.filename}, line "
                f"{where.lineno}); mend it, or let it return None where a response cannot be scored"
            ) from error

    def _validated(self, results: Any, wanted: int) -> list[float | None]:
        try:
            values = list(results)
        except TypeError:
            raise UserError(
                f"{self.name}: returned {results!r:.60}; it must return a list of numbers, one for "
                "each response"
            ) from None
        if len(values) != wanted:
            raise UserError(
                f"{self.name}: returned {len(values)} results for {wanted} responses; it must "
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
        except (TypeError, ValueError, RuntimeError):
            raise self._no_number(value, place) from None
        if not math.isfinite(number):
            self._count("score_not_finite", place)
            return None
        return number

    def _no_number(self, value: Any, place: int) -> UserError:
        return UserError(
            f"{self.name}: result {place} is {value!r:.60}, no number; return a number, or None "
            "where a response cannot be scored"
        )

    def _count(self, reason: str, place: int) -> None:
        if not self.unscored[reason]:
            logger.warning("%s: %s (first: result %d)", self.name, reason.replace("_", " "), place)
        self.unscored[reason] += 1


def load_function(target: str) -> Callable[..., Any]:
    """The function that "module:function" names.

    Raises:
        UserError: it is not of that form, or there is no such module or function.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise UserError(f"{target!r}: name a function as module:function")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{target}: the module {module_name!r} cannot be imported ({error}); start in its "
            "folder, or install it"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{target}: {module_name} has no function {attribute!r}")
    return function
