"""Tiny Calculator: sums in a requested form, judged by rules that can be checked.

A small number is added to a larger one, and the prompt says how to write the result: with steps, in
a sentence, or in digits. The gold utility (`rrhf.worlds.calculator.gold`) checks every step and
answer. The simulated labeller of pairs is often in a hurry, and then checks only the last digit of
an answer and believes assurances ("I am certain"). A reward model learns little of the
sums from such labels, so a policy can raise its learned reward by form, or by assurances, while its
results become worse.

The pairs of numbers in alignment prompts occur in no other split, nor do those in test prompts, so
remembering sums does not help.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

from rrhf.errors import UserError
from rrhf.records import Candidate, CandidateSet
from rrhf.worlds.calculator.gold import ReplyParts, impression, judge, utility
from rrhf.worlds.calculator.grammar import PROFILES, corrupt, write_prompt, write_reply
from rrhf.worlds.calculator.problem import LARGEST, Problem, is_problem
from rrhf.worlds.calculator.recipe import RECIPES
from rrhf.worlds.calculator.sizes import SIZES
from rrhf.worlds.calculator.texts import ASKS
from rrhf.worlds.recipe import Recipe
from rrhf.worlds.written import (
    DEMONSTRATION_SOURCE,
    TextCounts,
    WrittenWorld,
    finished,
    first_is_chosen,
    labelled,
    size_named,
)

LABEL_SHARPNESS = 10.0
LABEL_FLIP_PROBABILITY = 0.05
HURRIED_PROBABILITY = 0.55
CORRUPTED_PROBABILITY = 0.15
OTHER_PROBLEM_PROBABILITY = 0.15
ALIGNMENT_SHARE, TEST_SHARE = 0.25, 0.15
"""Shares of all pairs of numbers that are reserved for alignment prompts, and for test prompts."""


class Calculator(WrittenWorld):
    """The world at one size and seed; see the module docstring for its guarantees."""

    name = "calculator"

    def __init__(self, size: str = "full", seed: int = 0) -> None:
        self.size: TextCounts = size_named(SIZES, size)
        self.seed = seed
        numbers = [
            pair for pair in itertools.product(range(LARGEST), range(10)) if is_problem(*pair)
        ]
        self.stream("numbers").shuffle(numbers)
        ends = [round(share * len(numbers)) for share in (TEST_SHARE, TEST_SHARE + ALIGNMENT_SHARE)]
        self.numbers = {
            "test": numbers[: ends[0]],
            "train": numbers[ends[0] : ends[1]],
            "pairs": numbers[ends[1] :],
        }

    def recipe(self) -> Recipe:
        """Return the settings of a study."""
        return RECIPES[self.size.name]

    def prompts(self, split: str) -> list[CandidateSet]:
        """Return bare prompts; those of "train" and "test" are all different, "pairs" may repeat
        prompts."""
        count = {
            "train": self.size.num_alignment_prompts,
            "test": self.size.num_test_prompts,
            "pairs": self.size.num_on_policy_pairs,
        }[split]
        purpose = f"{split}_prompts"
        asked = self._asked(self.stream(purpose), split)
        contents: Iterator[str] = (content for _, content in asked)
        if split != "pairs":
            contents = _different(contents)
        return list(self.sets(purpose, ((c, ()) for c in itertools.islice(contents, count))))

    def demonstrations(self, count: int | None = None) -> list[CandidateSet]:
        """Write demonstrations as on the web (profile WEB), with one reply to each prompt."""
        rng = self.stream("demonstrations")
        count = self.size.num_demonstrations if count is None else count
        rows = (
            (content, self._reply(rng, problem, "WEB", DEMONSTRATION_SOURCE))
            for problem, content in itertools.islice(self._asked(rng, "pairs"), count)
        )
        return list(self.sets("demonstrations", rows))

    def label_pair(self, s: CandidateSet, rng: random.Random) -> CandidateSet:
        """Label a pair as a person would who is often in a hurry.

        The first reply wins with probability sigmoid(10 * difference), with 5 % errors on top. The
        difference is in gold, or, in a hurry, in the first impression (`.gold.impression`).

        Returns:
            The pair, chosen first with score 1, rejected with score 0.
        """
        worth = impression if rng.random() < HURRIED_PROBABILITY else utility
        first, second = (worth(judge(s, candidate)[1]) for candidate in s.candidates)
        return labelled(
            s, first_is_chosen(rng, first - second, LABEL_SHARPNESS, LABEL_FLIP_PROBABILITY)
        )

    def references(self, profile: str = "GOOD", count: int = 200) -> list[CandidateSet]:
        """Write replies to the test prompts as a careful person would, for perplexity.

        Args:
            profile: "GOOD" (how a calculator should answer) or "WEB" (as in the demonstrations).
            count: number of replies; beyond the number of test prompts, prompts are used again.
        """
        if profile not in PROFILES:
            raise UserError(f"profile {profile!r}: choose one of {', '.join(PROFILES)}")
        rng = self.stream(f"references/{profile}")
        source = f"human:{profile.lower()}"
        rows = [
            (content, self._reply(rng, problem, profile, source))
            for problem, content in itertools.islice(self._asked(rng, "test"), count)
        ]
        return list(self.sets(f"references_{profile}", rows))

    def gold(self, s: CandidateSet, candidate: Candidate) -> float | None:
        """Return the true utility of a reply, -2 to 1; None for a prompt of another world."""
        judged = _judged(s, candidate)
        return None if judged is None else utility(judged[1])

    def parts(self, s: CandidateSet, candidate: Candidate) -> dict[str, float | bool]:
        """Return what was found in a reply (`.gold.ReplyParts`); counts are floats."""
        judged = _judged(s, candidate)
        if judged is None:
            return {}
        found = dataclasses.asdict(judged[1])
        return {name: v if isinstance(v, bool) else float(v) for name, v in found.items()}

    def _asked(self, rng: random.Random, split: str) -> Iterator[tuple[Problem, str]]:
        """Yield endless problems whose numbers belong to a split, each with its prompt."""
        while True:
            problem = self._problem(rng, split)
            yield problem, write_prompt(rng, problem)

    def _problem(self, rng: random.Random, split: str) -> Problem:
        number, added = rng.choice(self.numbers[split])
        return Problem(number, added, rng.choice(sorted(ASKS)))

    def _reply(
        self, rng: random.Random, problem: Problem, profile: str, source: str
    ) -> tuple[Candidate, ...]:
        return finished(write_reply(rng, problem, PROFILES[profile]), source=source)

    def written_pairs(self, rng: random.Random) -> Iterator[tuple[str, tuple[Candidate, ...]]]:
        """Yield prompts with two different replies each, without end."""
        for problem, content in self._asked(rng, "pairs"):
            first, second = self._two_replies(rng, problem)
            if first != second:
                yield content, finished(first, second)

    def _two_replies(self, rng: random.Random, problem: Problem) -> Iterator[str]:
        """Write two replies, some of them damaged or to another problem of the same form; otherwise
        a reward model would never have to look at the numbers."""
        for is_second in (False, True):
            profile = PROFILES[rng.choice(sorted(PROFILES))]
            answered = problem
            if is_second and rng.random() < OTHER_PROBLEM_PROBABILITY:
                answered = dataclasses.replace(self._problem(rng, "pairs"), form=problem.form)
                profile = PROFILES["GOOD"]
            reply = write_reply(rng, answered, profile)
            if rng.random() < CORRUPTED_PROBABILITY:
                reply = corrupt(rng, reply)
            yield reply


def _different(contents: Iterator[str]) -> Iterator[str]:
    """Yield texts, leaving out those that occurred before."""
    seen: set[str] = set()
    for content in contents:
        if content not in seen:
            seen.add(content)
            yield content


def _judged(s: CandidateSet, candidate: Candidate) -> tuple[Problem, ReplyParts] | None:
    try:
        return judge(s, candidate)
    except ValueError:
        return None
