"""What a world is: prompts with a true preference, known as a function.

To judge responses (`--scorer gold:NAME`, `--gold NAME`) a world needs `gold` alone. A study, which
makes its data from the world and trains on them, needs all of it. A world of your own derives from
`World` and writes what it has; it is named as `package.module:name`.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn, Protocol, runtime_checkable

from rrhf.errors import UserError
from rrhf.records import Candidate, CandidateSet
from rrhf.worlds.recipe import Recipe

PromptSplit = Literal["train", "test", "pairs"]
PairSplit = Literal["train", "held_out"]


@runtime_checkable
class World(Protocol):
    """A world of one size and seed.

    Attributes:
        name: of the folder in `CandidateSet.origin`; `--gold auto` goes by it.
    """

    name: str = ""

    def __init__(self, size: str = "full", seed: int = 0) -> None:
        """Of this size, "full" or "smoke", and seed; a world that has neither leaves this out."""

    @abstractmethod
    def gold(self, s: CandidateSet, candidate: Candidate) -> float | None:
        """What a response is truly worth, higher is better; None = the prompt is not of here."""
        ...

    def parts(self, s: CandidateSet, candidate: Candidate) -> Mapping[str, float | bool]:
        """What the worth is made of, by name; empty where nothing is known.

        Counts are floats. `harmful` and `refused`, where both are there, give the rates of
        refusals; every other one the share of responses that show it.
        """
        return {}

    def prompts(self, split: PromptSplit) -> list[CandidateSet]:
        """Bare prompts: to align on, to test on, or to sample pairs for `label_pair`."""
        _lacks(self, "prompts")

    def demonstrations(self) -> list[CandidateSet]:
        """Prompts with a reply each, for fine-tuning and for the tokenizer."""
        _lacks(self, "demonstrations")

    def pairs(self, split: PairSplit) -> list[CandidateSet]:
        """Labelled pairs, chosen first with score 1, to train a reward model and to measure it."""
        _lacks(self, "pairs")

    def references(self) -> Sequence[CandidateSet]:
        """Good replies to test prompts, for perplexity."""
        _lacks(self, "references")

    def label_pair(self, s: CandidateSet, rng: random.Random) -> CandidateSet:
        """Two candidates as a person would label them: chosen first, score 1, rejected 0."""
        _lacks(self, "label_pair")

    def recipe(self) -> Recipe:
        """Settings of a study at this size."""
        _lacks(self, "recipe")


@runtime_checkable
class WorldMaker(Protocol):
    """A class, or a function, that makes a world.

    It is called without arguments where only the preference is needed, and by a study with both.
    """

    def __call__(self, size: str = ..., seed: int = ...) -> World: ...


def _lacks(world: World, what: str) -> NoReturn:
    raise UserError(
        f"world {world.name or type(world).__name__}: has no `{what}`, which a study needs; "
        "rrhf.worlds.protocol.World says what it is"
    )
