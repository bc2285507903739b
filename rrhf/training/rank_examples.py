"""Scored candidates become the rows that ranking trains on.

Which candidates count, what is cut and what is left out is decided here, once, and every case is
counted: the counts stand in the run's manifest, and the first of each kind is logged.

Two row layouts. The toolkit's own (`encode_own`) reserves room for the response and cuts prompts on
the left by whole turns. The one of the program that was released with the RRHF paper
(`encode_released`) is kept fault for fault, for reproducing published numbers: prompts are cut on
the *right* (the last turn and its cue go first), responses are tokenised like texts of their own
(with a BOS inside the row, where the tokenizer adds one), and a prompt that fills the window turns
the cutting of responses off. Not reproduced: the attention mask that hides tokens equal to the pad
id, and the tokenizer's own rules for cutting texts that it also closes with a special token.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace

from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import EncodedSet
from rrhf.records import Candidate, CandidateSet

logger = logging.getLogger(__name__)

STOP_STRINGS = ("\n\nHuman:", "\n\nAssistant:", "\n\nhuman:", "\n\nassistant:")
HUMAN_SOURCE_PREFIX = "human:"
NUM_PROVIDED_WITHOUT_SOURCES = 2


def cut_at_next_speaker(response: str) -> str:
    """The response up to the first cue of another turn; stripped only where something was cut."""
    for stop in STOP_STRINGS:
        before, found, _ = response.partition(stop)
        if found:
            response = before.strip()
    return response


def is_provided(candidate_set: CandidateSet) -> list[bool]:
    """Which candidates came with the data set, and which were sampled.

    By `source` ("human:..."), where any candidate names one. Lines as RRHF published them name
    none: there the last two responses are the data set's.
    """
    candidates = candidate_set.candidates
    if any(candidate.source for candidate in candidates):
        return [candidate.source.startswith(HUMAN_SOURCE_PREFIX) for candidate in candidates]
    first = len(candidates) - NUM_PROVIDED_WITHOUT_SOURCES
    return [place >= first for place in range(len(candidates))]


@dataclass
class RankEncoder:
    """Makes training examples of candidate sets; the same set always gives the same example.

    Attributes:
        codec: the token boundary.
        model_max_length: most tokens of prompt and response together.
        max_response_tokens: most tokens of a response; None = what the prompt leaves, and at least
            half of `model_max_length`.
        long_responses: "cut" (they then have no EOS) or "drop".
        only_use_provide: only candidates that came with the data set.
        only_use_sample: only sampled candidates.
        stop_response: cut responses where they go on to write the next turn.
        released: the row layout of the released program.
        window: positions that the model knows, or None.
        counts: what was met on the way; every call adds to it.
    """

    codec: ChatCodec
    model_max_length: int
    max_response_tokens: int | None = None
    long_responses: str = "cut"
    only_use_provide: bool = False
    only_use_sample: bool = False
    stop_response: bool = False
    released: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, candidate_set: CandidateSet) -> EncodedSet | None:
        """The example of a set, or None where it yields none."""
        self.counts["prompts"] += 1
        chosen = replace(candidate_set, candidates=self._choose(candidate_set))
        if not chosen.candidates:
            self._note("prompts_without_candidates", chosen)
            return None
        example = self.encode_released(chosen) if self.released else self.encode_own(chosen)
        if example is not None:
            self._count(example, chosen)
        return example

    def encode_own(self, candidate_set: CandidateSet) -> EncodedSet | None:
        """Prompt cut on the left by turns, responses closed by one end id unless they were cut."""
        rows, scores = [], []
        for candidate in candidate_set.candidates:
            ids = self.codec.encode_response(
                candidate_set, candidate.response, candidate.finish_reason
            )
            if ids:
                rows.append(ids)
                scores.append(candidate.score)
            else:
                self._note("candidates_cut_to_nothing", candidate_set)
        if not rows:
            self._note("prompts_without_candidates", candidate_set)
            return None

        reserve = min(
            max(len(ids) for ids in rows), self.max_response_tokens or self.model_max_length // 2
        )
        prompt_ids = self.codec.encode_prompt(candidate_set)
        if prompt_ids is None or len(prompt_ids) > self.model_max_length - reserve:
            prompt_ids = self.codec.encode_prompt(candidate_set, self.model_max_length - reserve)
            self._note("prompts_too_long" if prompt_ids is None else "prompts_cut", candidate_set)
        elif not prompt_ids:
            self._note("prompts_empty", candidate_set)
        if not prompt_ids:
            return None

        room = self.model_max_length - len(prompt_ids)
        if self.max_response_tokens is not None:
            room = min(room, self.max_response_tokens)
        too_long = [len(ids) > room for ids in rows]
        if any(too_long):
            what = "responses_dropped" if self.long_responses == "drop" else "responses_cut"
            self._note(what, candidate_set, sum(too_long))
            if self.long_responses == "drop":
                kept = [place for place, is_long in enumerate(too_long) if not is_long]
                rows, scores = [rows[place] for place in kept], [scores[place] for place in kept]
                if not rows:
                    self._note("prompts_without_candidates", candidate_set)
                    return None
            rows = [ids[:room] for ids in rows]
        return EncodedSet(prompt_ids, rows, _known(scores))

    def encode_released(self, candidate_set: CandidateSet) -> EncodedSet | None:
        """Rows as the released program lays them out; see the module text."""
        tokenizer = self.codec.tokenizer
        prompt_ids = tokenizer(self.codec.prompt_text(candidate_set)).input_ids
        if not prompt_ids:
            self._note("prompts_empty", candidate_set)
            return None
        if len(prompt_ids) > self.model_max_length:
            self._note("prompts_cut", candidate_set)
            prompt_ids = prompt_ids[: self.model_max_length]
        room = self.model_max_length - len(prompt_ids)
        rows = []
        for candidate in candidate_set.candidates:
            text = self.codec.response_text(candidate_set, candidate.response)
            ids = tokenizer(text + tokenizer.eos_token).input_ids
            if room and len(ids) > room:  # no room left is taken for no limit
                self._note("responses_cut", candidate_set)
                ids = ids[:room]
            rows.append(ids)
        longest = len(prompt_ids) + max(len(ids) for ids in rows)
        if self.window is not None and longest > self.window:
            self._note("prompts_beyond_the_window", candidate_set)
            return None
        scores = [candidate.score for candidate in candidate_set.candidates]
        return EncodedSet(prompt_ids, rows, _known(scores))

    def _choose(self, candidate_set: CandidateSet) -> tuple[Candidate, ...]:
        chosen = []
        for candidate, provided in zip(
            candidate_set.candidates, is_provided(candidate_set), strict=True
        ):
            if (self.only_use_provide and not provided) or (self.only_use_sample and provided):
                continue
            if candidate.score is None:
                self._note("candidates_without_score", candidate_set)
                continue
            if self.stop_response:
                response = cut_at_next_speaker(candidate.response)
                if response != candidate.response:
                    self._note("responses_stopped", candidate_set)
                    candidate = replace(candidate, response=response, finish_reason="stop")
            chosen.append(candidate)
        return tuple(chosen)

    def _count(self, example: EncodedSet, candidate_set: CandidateSet) -> None:
        assert example.scores is not None, "candidates without a score were left out"
        self.counts["prompts_used"] += 1
        self.counts["candidates_used"] += len(example.response_ids)
        if len(example.scores) == 1:
            self._note("prompts_with_one_candidate", candidate_set)
        elif len(set(example.scores)) == 1:
            self._note("prompts_all_tied", candidate_set)

    def _note(self, what: str, candidate_set: CandidateSet, times: int = 1) -> None:
        if not self.counts[what]:
            logger.info("first of %s: prompt %s %.60r", what, candidate_set.id, candidate_set.query)
        self.counts[what] += times


def _known(scores: list[float | None]) -> list[float]:
    known = [score for score in scores if score is not None]
    assert len(known) == len(scores), "candidates without a score were left out"
    return known
