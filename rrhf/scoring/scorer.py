"""The interface of scorers, which score responses.

Your own scorer derives from `Scorer` and implements `score`; its name on the command line is
`package.module:name`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from rrhf.records import Candidate, CandidateSet


@runtime_checkable
class Scorer(Protocol):
    """Scores candidates; a higher score is better.

    Candidates arrive grouped by prompt, so that a scorer can process each prompt once. A scorer
    sees text, messages and `finish_reason`, and applies its own tokenizer and template.

    Attributes:
        name: name in manifests and tables, such as "reward_model:<folder>".
        normalized: True if scores were normalised (mean 0, deviation 1 on the training data).
        quantity: what the numbers are called in messages, such as "score".
        unit: unit of the numbers; "" = none.
        logits_per_unit: what a difference of two scores is multiplied by to become the log-odds
            that the better one is preferred.
        window: maximum number of tokens of prompt and response together; None = no limit.
        is_relative: True if a score compares a response with the others of its set, so that scores
            of two sets, or of two policies, cannot be compared.
        model: the frozen module that computes the scores in this process; callers may move its
            weights elsewhere between two calls of `score`. None = no such module.
    """

    name: str = ""
    normalized: bool = False
    quantity: str = "score"
    unit: str = ""
    logits_per_unit: float = 1.0
    window: int | None = None
    is_relative: bool = False
    model: Any = None

    @abstractmethod
    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Return, for each set, a list with the score of each candidate; None = could not be
        scored."""
        ...

    def describe(self) -> dict[str, Any]:
        """Describe the scorer for manifests: `name`, `normalized`, and everything else on which the
        scores depend."""
        return {"name": self.name, "normalized": self.normalized}

    def probe(self) -> None:
        """Check that what scores is there, if it is not in this process; called before any model is
        loaded.

        Raises:
            UserError: it cannot be reached, or does not answer as it should.
        """
        return

    def fits(self, s: CandidateSet, candidate: Candidate) -> bool:
        """Whether the response fits into the window after at least the prompt's last turn.

        A response that does not fit gets no score, which does not count as a failure of the scorer.
        """
        return True


@runtime_checkable
class ScorerMaker(Protocol):
    """A class, or a function, that makes a scorer.

    Of the following arguments, it gets those that its signature names: `options`, an
    `rrhf.scoring.config.RewardModelOptions`; `device`, the device on which a model runs; and, for a
    scorer with a prefix (`gold:TARGET`), `target`, and `name`, the whole name.
    """

    def __call__(self, *args: Any, **named: Any) -> Scorer: ...
