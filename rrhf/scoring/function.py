"""Scores responses with a Python function that the user wrote, named as `module:function`.

    def score(prompts, responses, messages): -> one number for each response, or None

The arguments are three lists with one entry for each response: the prompt as text, the response as
text, and the conversation as a list of {"role", "content"} (None if only the text is known).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import islice

from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.scoring.checked import CheckedScorer
from rrhf.user_code import load_function


class FunctionScorer(CheckedScorer):
    """Scores all given candidates with one call of a function.

    Args:
        target: "module:function"; the module is looked for in the working directory too.

    Raises:
        UserError: there is no such module or function.
    """

    def __init__(self, target: str) -> None:
        super().__init__(f"function:{target}", "function")
        self._function = load_function(target)
        try:
            inspect.signature(self._function).bind([], [], [])
        except ValueError:  # some built-in functions have no signature
            return
        except TypeError as error:
            raise UserError(
                f"{self.name}: cannot be called with (prompts, responses, messages): {error}; the "
                "function needs these three parameters"
            ) from None

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Return the scores, in order; None where the function returned None, NaN or an infinity.

        Raises:
            UserError: the function raised, returned too many or too few results, or returned
                something other than a number.
        """
        sizes = [len(s.responses) for s in sets]
        prompts = [s.query for s, size in zip(sets, sizes, strict=True) for _ in range(size)]
        responses = [response for s in sets for response in s.responses]
        turns = [s.conversation for s in sets]
        messages = [own for own, size in zip(turns, sizes, strict=True) for _ in range(size)]
        wanted = len(prompts)  # the function may change its lists
        values = self._listed(
            lambda: self._function(prompts, responses, messages),
            "a list of numbers, one for each response, in order",
            wanted,
        )
        if len(values) != wanted:
            number = str(len(values)) if len(values) < wanted else f"more than {wanted}"
            raise UserError(
                f"{self.name}: returned {number} results for {wanted} responses; it must "
                "return one for each, in order"
            )
        results = iter(self._numbers(values))
        return [list(islice(results, size)) for size in sizes]
