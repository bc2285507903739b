"""Prompts and responses that fit a length: what is cut, what is left out, and how often.

The response comes first: it gets the room that it needs, up to half of the length (or the limit
that is set), and the prompt loses whole turns on its left to make that room. A response that is
still too long is cut, and then has no end; or it is left out. Every case is counted
(`rrhf.training.methods.data_summary` tells the counts).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rrhf.data.chat_format import ChatCodec
from rrhf.records import Candidate, CandidateSet


@dataclass
class RowFitter:
    """Encodes prompts and responses so that each pair fits.

    Attributes:
        codec: the token boundary.
        model_max_length: most tokens of prompt and response together.
        max_response_tokens: most tokens of a response; None = what the prompt leaves, and at least
            half of `model_max_length`.
        long_responses: "cut" (they then have no EOS) or "drop".
        counts: what was met on the way; every call adds to it.
        first: the id of the first prompt of each case.
    """

    codec: ChatCodec
    model_max_length: int
    max_response_tokens: int | None = None
    long_responses: str = "cut"
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def fit(self, candidate_set: CandidateSet) -> tuple[list[int], dict[int, list[int]]] | None:
        """Prompt ids, and the ids of each response that is kept, by its place in the set.

        None, and counted, where the prompt or every response is left out.
        """
        rows = self._encode_responses(candidate_set)
        if not rows:
            self.note("prompts_without_responses", candidate_set)
            return None
        longest = max(len(ids) for ids in rows.values())
        reserve = min(longest, self.max_response_tokens or self.model_max_length // 2)
        prompt_ids = self._encode_prompt(candidate_set, self.model_max_length - reserve)
        if not prompt_ids:
            return None

        room = self.model_max_length - len(prompt_ids)
        if self.max_response_tokens is not None:
            room = min(room, self.max_response_tokens)
        too_long = [place for place, ids in rows.items() if len(ids) > room]
        if too_long and self.long_responses == "drop":
            self.note("responses_dropped", candidate_set, len(too_long))
            rows = {place: ids for place, ids in rows.items() if place not in too_long}
            if not rows:
                self.note("prompts_without_responses", candidate_set)
                return None
        elif too_long:
            self.note("responses_cut", candidate_set, len(too_long))
        return prompt_ids, {place: ids[:room] for place, ids in rows.items()}

    def note(self, what: str, candidate_set: CandidateSet, times: int = 1) -> None:
        """Count a case, and remember the first prompt of its kind."""
        self.first.setdefault(what, candidate_set.id)
        self.counts[what] += times

    def _encode_responses(self, candidate_set: CandidateSet) -> dict[int, list[int]]:
        rows = {}
        for place, candidate in enumerate(candidate_set.candidates):
            ids = self.codec.encode_response(
                candidate_set, candidate.response, candidate.finish_reason
            )
            if ids:
                rows[place] = ids
            else:
                self.note("responses_cut_to_nothing", candidate_set)
        return rows

    def _encode_prompt(self, candidate_set: CandidateSet, room: int) -> list[int] | None:
        whole = self.codec.encode_prompt(candidate_set)
        if whole is not None and len(whole) <= room:
            if not whole:
                self.note("prompts_empty", candidate_set)
            return whole
        cut = self.codec.encode_prompt(candidate_set, room)
        self.note("prompts_too_long" if cut is None else "prompts_cut", candidate_set)
        return cut


def known_scores(candidates: tuple[Candidate, ...]) -> list[float]:
    """The candidates' scores; all must have one."""
    scores = [candidate.score for candidate in candidates]
    known = [score for score in scores if score is not None]
    assert len(known) == len(scores), "candidates without a score were to be left out"
    return known
