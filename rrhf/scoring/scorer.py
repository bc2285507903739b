"""The interface of every source of preference.

A scorer of your own derives from `Scorer` and writes `score`; it is named as `package.module:name`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from rrhf.records import Candidate, CandidateSet


@runtime_checkable
class Scorer(Protocol):
    """Gives each candidate a score; higher is better.

    Sets arrive grouped, so that a prompt can be computed once. A scorer sees text, messages and
    `finish_reason`, and applies its own tokenizer and template.

    Attributes:
        name: for manifests and tables, such as "reward_model:<folder>".
        normalized: True if scores were normalised (mean 0, deviation 1 on the training data).
        quantity: what the numbers are.
        unit: of that; "" = none.
        window: most tokens of prompt and response together; None = any number.
        model: the frozen module that runs in this process, whose weights may be elsewhere between
            two calls of `score`; None = there is none.
    """

    name: str = ""
    normalized: bool = False
    quantity: str = "score"
    unit: str = ""
    window: int | None = None
    model: Any = None

    @abstractmethod
    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """A list for each set, a score for each candidate, in order; None = could not be scored."""
        ...

    def describe(self) -> dict[str, Any]:
        """For manifests: `name`, `normalized`, and what else the scores depend on."""
        return {"name": self.name, "normalized": self.normalized}

    def fits(self, s: CandidateSet, candidate: Candidate) -> bool:
        """Whether the response fits into the window behind at least the prompt's last turn.

        What does not has no score, and that is no fault of the scorer.
        """
        return True


@runtime_checkable
class ScorerMaker(Protocol):
    """A class, or a function, that makes a scorer.

    It is given, of these, what its parameters name: `options`, an
    `rrhf.scoring.config.RewardModelOptions`; `device`, where a model belongs; and behind a prefix
    (`gold:TARGET`) the `target`.
    """

    def __call__(self, *args: Any, **named: Any) -> Scorer: ...
