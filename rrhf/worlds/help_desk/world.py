"""Tiny Help Desk: a whole alignment task in a box, with the true preference known.

Customers ask a help desk for one or two tips, or for something that the desk should refuse. The
world writes demonstrations, preference pairs, prompts and references, and judges any reply by a
gold utility (`rrhf.worlds.help_desk.gold`). So a study of minutes on one core can show what no
real data set can: whether a method raised the *true* preference or only the learned one.

Everything is drawn from streams named by (seed, purpose), so that no part depends on which others
were drawn, and the first n of a stream are the same however many are asked for. Prompts for
alignment and tests are all different, and none stands in a demonstration or a pair. The held-out
topics are known from demonstrations and pairs but never aligned on.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from rrhf.data.chat_format import render_messages
from rrhf.errors import UserError
from rrhf.records import (
    CHOSEN_SOURCE,
    REJECTED_SOURCE,
    Candidate,
    CandidateSet,
    Message,
    set_id,
)
from rrhf.worlds.help_desk.gold import Request, judge, read_request, utility
from rrhf.worlds.help_desk.grammar import PROFILES, Grammar
from rrhf.worlds.help_desk.sizes import WorldSize, world_size
from rrhf.worlds.help_desk.texts import BENIGN_TOPICS, HARMFUL_TOPICS, NAMES

LABEL_SHARPNESS = 10.0
LABEL_FLIP_PROBABILITY = 0.05
CORRUPTED_PROBABILITY = 0.15
OFF_TOPIC_PROBABILITY = 0.15
DEMONSTRATION_SOURCE = "human:demo"


class HelpDesk:
    """The world at one size and seed; see the module text for what is promised."""

    def __init__(self, size: str = "full", seed: int = 0) -> None:
        self.size: WorldSize = world_size(size)
        self.seed = seed
        self.grammar = Grammar(
            BENIGN_TOPICS[: self.size.num_benign_topics],
            HARMFUL_TOPICS[: self.size.num_harmful_topics],
            NAMES[: self.size.num_names],
        )
        self.topics = frozenset({*self.grammar.benign, *self.grammar.harmful})
        seen_topics = self.topics - self.size.held_out_topics
        self._reserved: set[str] = set()
        self._alignment = self._reserve("alignment", self.size.num_alignment_prompts, seen_topics)
        self._test = self._reserve("test", self.size.num_test_prompts, seen_topics)
        self._ood = self._reserve("ood", self.size.num_ood_prompts, self.size.held_out_topics)

    def demonstrations(self, count: int | None = None) -> list[CandidateSet]:
        """Conversations as the web has them (profile WEB), one reply each."""
        count = self.size.num_demonstrations if count is None else count
        rng = self._stream("demonstrations")
        occurrences: Counter[str] = Counter()
        sets = []
        for _ in range(count):
            request, content = self._free_prompt(rng)
            reply = self.grammar.write_reply(rng, request, PROFILES["WEB"])
            candidate = Candidate(reply, DEMONSTRATION_SOURCE, finish_reason="stop")
            sets.append(_new_set(content, "demonstrations", (candidate,), occurrences))
        return sets

    def preference_pairs(self, count: int | None = None) -> list[CandidateSet]:
        """Labelled pairs of written replies: good, mixed, off-topic and damaged ones."""
        count = self.size.num_static_pairs if count is None else count
        return self._labelled_pairs("pairs", count)

    def held_out_pairs(self, count: int = 500) -> list[CandidateSet]:
        """Pairs of the same kind, to measure a reward model on."""
        return self._labelled_pairs("held_out_pairs", count)

    def pair_prompts(self, count: int | None = None) -> list[CandidateSet]:
        """Bare prompts on all topics, to sample two replies of a policy for `label_pair`."""
        count = self.size.num_on_policy_pairs if count is None else count
        rng = self._stream("pair_prompts")
        occurrences: Counter[str] = Counter()
        contents = [self._free_prompt(rng)[1] for _ in range(count)]
        return [_new_set(content, "pair_prompts", (), occurrences) for content in contents]

    def label_pair(self, set_with_two_candidates: CandidateSet, rng: random.Random) -> CandidateSet:
        """Ask a person which is better: Bernoulli(sigmoid(10 * gold difference)), then 5 % slips.

        Returns:
            The pair, chosen first with score 1, rejected with score 0.
        """
        first, second = set_with_two_candidates.candidates
        difference = self.gold(set_with_two_candidates, first) - self.gold(
            set_with_two_candidates, second
        )
        first_wins = rng.random() < 1.0 / (1.0 + math.exp(-LABEL_SHARPNESS * difference))
        if rng.random() < LABEL_FLIP_PROBABILITY:
            first_wins = not first_wins
        chosen, rejected = (first, second) if first_wins else (second, first)
        return dataclasses.replace(
            set_with_two_candidates,
            candidates=(
                dataclasses.replace(chosen, source=CHOSEN_SOURCE, score=1.0),
                dataclasses.replace(rejected, source=REJECTED_SOURCE, score=0.0),
            ),
        )

    def alignment_prompts(self) -> list[CandidateSet]:
        """Prompts to align on; held-out topics never occur."""
        return [_new_set(content, "alignment_prompts") for content in self._alignment]

    def test_prompts(self) -> list[CandidateSet]:
        """Other prompts on the topics of the alignment prompts."""
        return [_new_set(content, "test_prompts") for content in self._test]

    def ood_prompts(self) -> list[CandidateSet]:
        """Prompts on the held-out topics only."""
        return [_new_set(content, "ood_prompts") for content in self._ood]

    def references(self, profile: str, count: int = 200) -> list[CandidateSet]:
        """Replies that a person would write to the test prompts, for perplexity.

        Args:
            profile: "GOOD" (how the desk should speak) or "WEB" (as in the demonstrations).
            count: past the number of test prompts, they are answered once more.
        """
        if profile not in PROFILES:
            raise UserError(f"profile {profile!r}: choose one of {', '.join(PROFILES)}")
        rng = self._stream(f"references/{profile}")
        occurrences: Counter[str] = Counter()
        sets = []
        for index in range(count):
            content = self._test[index % len(self._test)]
            reply = self.grammar.write_reply(rng, read_request(content), PROFILES[profile])
            candidate = Candidate(reply, f"human:{profile.lower()}", finish_reason="stop")
            sets.append(_new_set(content, f"references_{profile}", (candidate,), occurrences))
        return sets

    def gold(self, s: CandidateSet, candidate: Candidate) -> float:
        """The true utility of a reply, -2 to 1; ValueError for a prompt of another world."""
        request, parts = judge(s, candidate)
        return utility(request, parts)

    def parts(self, s: CandidateSet, candidate: Candidate) -> dict[str, float | bool]:
        """What was found in a reply (`.gold.ReplyParts`), and if it was to be refused.

        Counts are floats; "refused" says whether there was any refusal.
        """
        request, parts = judge(s, candidate)
        values = {
            name: value if isinstance(value, bool) else float(value)
            for name, value in dataclasses.asdict(parts).items()
        }
        return {"harmful": request.harmful, **values, "refused": parts.refused > 0}

    def _stream(self, purpose: str) -> random.Random:
        return random.Random(f"help_desk/{self.size.name}/{self.seed}/{purpose}")

    def _reserve(self, purpose: str, count: int, topics: frozenset[str]) -> list[str]:
        rng = self._stream(purpose)
        contents: list[str] = []
        for _ in range(count):
            content = self._free_prompt(rng, topics)[1]
            self._reserved.add(content)
            contents.append(content)
        return contents

    def _free_prompt(
        self, rng: random.Random, topics: frozenset[str] | None = None
    ) -> tuple[Request, str]:
        """A prompt that is not reserved for alignment or tests; the request is drawn once, so that
        what is reserved does not thin its topic out."""
        request = self.grammar.draw_request(rng, self.topics if topics is None else topics)
        while True:
            content = self.grammar.write_prompt(rng, request)
            if content not in self._reserved:
                return request, content

    def _labelled_pairs(self, purpose: str, count: int) -> list[CandidateSet]:
        rng = self._stream(purpose)
        occurrences: Counter[str] = Counter()
        sets: list[CandidateSet] = []
        while len(sets) < count:
            request, content = self._free_prompt(rng)
            first, second = self._two_replies(rng, request)
            if first == second:
                continue
            candidates = (
                Candidate(first, finish_reason="stop"),
                Candidate(second, finish_reason="stop"),
            )
            pair = _new_set(content, purpose, candidates, occurrences)
            sets.append(self.label_pair(pair, rng))
        return sets

    def _two_replies(self, rng: random.Random, request: Request) -> Iterator[str]:
        """Written, not sampled: without off-topic and damaged replies a reward model learns no
        better than that myths and rude words are bad."""
        for is_second in (False, True):
            profile = PROFILES[rng.choice(sorted(PROFILES))]
            answered = request
            if is_second and rng.random() < OFF_TOPIC_PROBABILITY:
                answered = self.grammar.draw_request(rng, self.topics - {request.topic})
                profile = PROFILES["GOOD"]
            reply = self.grammar.write_reply(rng, answered, profile)
            if rng.random() < CORRUPTED_PROBABILITY:
                reply = self.grammar.corrupt(rng, reply)
            yield reply


class GoldScorer:
    """The gold utility as a scorer, for any size and seed; prompts of other worlds get None."""

    name = "gold:help_desk"
    normalized = False

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        return [[_gold_or_none(s, candidate) for candidate in s.candidates] for s in sets]


def _gold_or_none(s: CandidateSet, candidate: Candidate) -> float | None:
    try:
        request, parts = judge(s, candidate)
    except ValueError:
        return None
    return utility(request, parts)


def _new_set(
    content: str,
    purpose: str,
    candidates: tuple[Candidate, ...] = (),
    occurrences: Counter[str] | None = None,
) -> CandidateSet:
    messages = (Message("user", content),)
    query = render_messages("hh", messages)
    occurrence = 0 if occurrences is None else occurrences[content]
    if occurrences is not None:
        occurrences[content] += 1
    return CandidateSet(
        id=set_id(query, messages, occurrence),
        query=query,
        messages=messages,
        candidates=candidates,
        origin=f"help_desk/{purpose}",
    )
