"""The two forms in which responses and their scores travel.

**sets**: rrhf's own. A request is {"sets": [{"query": TEXT, "messages": [{"role", "content"}] or
null, "responses": [TEXT], "finish_reasons": [TEXT]}]}. Its answer is {"scores": [[NUMBER or
null]]}, one list for each set, one number for each response; null = could not be scored. An answer
may also have "too_long": [[BOOLEAN]], True where a response exceeds the scorer's window.

**openrlhf**: the form of OpenRLHF's remote reward models. A request is {"query": [TEXT],
"prompts": [TEXT], "labels": [...]}, one entry for each response, where a query is a prompt followed
by a response. Its answer is {"rewards": [NUMBER or null]}.

A number is finite. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from rrhf.records import FINISH_REASONS, ROLES, Candidate, CandidateSet, Message

Form = Literal["sets", "openrlhf"]
Scores = list[list[float | None]]


class Malformed(ValueError):
    """A request or an answer does not have its form; the message says where."""


@dataclass(frozen=True)
class Scored:
    """The scores of some sets.

    Attributes:
        scores: for each set, a score for each candidate; None = could not be scored.
        too_long: whether the candidate exceeds the scorer's window, in the same order.
    """

    scores: Scores
    too_long: list[list[bool]]


# Requests.


def encode_request(form: Form, sets: Sequence[CandidateSet]) -> dict[str, Any]:
    """Return the request for the scores of all candidates."""
    if form == "sets":
        return {"sets": [_set_as_json(s) for s in sets]}
    pairs = [(s, candidate) for s in sets for candidate in s.candidates]
    return {
        "query": [s.query + candidate.response for s, candidate in pairs],
        "prompts": [s.query for s, _ in pairs],
        "labels": [None for _ in pairs],
    }


def _set_as_json(s: CandidateSet) -> dict[str, Any]:
    turns = s.messages
    return {
        "query": s.query,
        "messages": turns and [{"role": m.role, "content": m.content} for m in turns],
        "responses": [candidate.response for candidate in s.candidates],
        "finish_reasons": [candidate.finish_reason for candidate in s.candidates],
    }


def decode_request(body: Any) -> tuple[Form, list[CandidateSet]]:
    """Read a request of either form.

    Raises:
        Malformed: it has neither form.
    """
    if not isinstance(body, dict) or not ("sets" in body or "query" in body):
        raise Malformed('the request is neither {"sets": [...]} nor {"query": [...], ...}')
    if "sets" in body:
        found = _list(body["sets"], "sets")
        return "sets", [_set_from_json(one, f"sets[{place}]") for place, one in enumerate(found)]
    queries = _texts(body["query"], "query")
    if "prompts" not in body:
        raise Malformed('"prompts" is missing; without them, nobody knows where a response begins')
    prompts = _texts(body["prompts"], "prompts")
    if len(prompts) != len(queries):
        raise Malformed(f"query has {len(queries)} texts, but prompts has {len(prompts)}")
    sets = []
    for place, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        if not query.startswith(prompt):
            raise Malformed(f"query[{place}] does not begin with prompts[{place}]")
        sets.append(CandidateSet(str(place), prompt, None, (Candidate(query[len(prompt) :]),)))
    return "openrlhf", sets


def _set_from_json(value: Any, place: str) -> CandidateSet:
    if not isinstance(value, dict):
        raise Malformed(f"{place} is not an object")
    query = value.get("query")
    if not isinstance(query, str):
        raise Malformed(f"{place}.query is not a text")
    messages = value.get("messages")
    responses = _texts(value.get("responses"), f"{place}.responses")
    reasons = value.get("finish_reasons", ["unknown"] * len(responses))
    if not isinstance(reasons, list) or len(reasons) != len(responses):
        raise Malformed(f"{place}.finish_reasons must have one entry for each response")
    if not set(map(str, reasons)) <= set(FINISH_REASONS):
        raise Malformed(f"{place}.finish_reasons: each is one of {', '.join(FINISH_REASONS)}")
    turns = None
    if messages is not None:
        listed = _list(messages, f"{place}.messages")
        turns = tuple(_turn(one, f"{place}.messages[{n}]") for n, one in enumerate(listed))
    both = zip(responses, reasons, strict=True)
    candidates = tuple(Candidate(text, finish_reason=reason) for text, reason in both)
    return CandidateSet(place, query, turns, candidates)


def _turn(value: Any, place: str) -> Message:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise Malformed(f"{place}: is no turn with a role of {', '.join(ROLES)}")
    if not isinstance(value.get("content"), str):
        raise Malformed(f"{place}.content is not a text")
    return Message(value["role"], value["content"])


# Answers.


def encode_answer(form: Form, scored: Scored) -> dict[str, Any]:
    """Return the answer of the server."""
    if form == "sets":
        answer: dict[str, Any] = {"scores": scored.scores}
        return answer | ({"too_long": scored.too_long} if any(map(any, scored.too_long)) else {})
    rewards = [score for scores in scored.scores for score in scores]
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


def decode_answer(form: Form, body: Any, sets: Sequence[CandidateSet]) -> Scored:
    """Read the answer to `encode_request(form, sets)`.

    Raises:
        Malformed: it does not have a number or null for each candidate.
    """
    sizes = [len(s.candidates) for s in sets]
    if not isinstance(body, Mapping):
        raise Malformed("the answer is not an object")
    if form == "openrlhf":
        rewards = _list(body.get("rewards"), "rewards")
        if len(rewards) != sum(sizes):
            raise Malformed(f"rewards has {len(rewards)} entries for {sum(sizes)} responses")
        numbers = iter([_number(one, f"rewards[{n}]") for n, one in enumerate(rewards)])
        return Scored([list(islice(numbers, size)) for size in sizes], [[False] * n for n in sizes])
    scores = list(_rows(body.get("scores"), "scores", sizes, _number))
    if body.get("too_long") is None:
        return Scored(scores, [[False] * size for size in sizes])
    return Scored(scores, list(_rows(body["too_long"], "too_long", sizes, _boolean)))


def _rows(
    value: Any, name: str, sizes: Sequence[int], read: Callable[[Any, str], Any]
) -> Iterator[list[Any]]:
    rows = _list(value, name)
    if len(rows) != len(sizes):
        raise Malformed(f"{name} has {len(rows)} lists for {len(sizes)} sets")
    for place, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        if len(_list(row, f"{name}[{place}]")) != size:
            raise Malformed(f"{name}[{place}] has {len(row)} entries for {size} responses")
        yield [read(one, f"{name}[{place}][{number}]") for number, one in enumerate(row)]


def _number(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise Malformed(f"{place} is {value!r:.60}; a score is a finite number or null")


def _boolean(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise Malformed(f"{place} is {value!r:.60}, not true or false")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Malformed(f"{name} is not a list")
    return value


def _texts(value: Any, name: str) -> list[str]:
    found = _list(value, name)
    for place, one in enumerate(found):
        if not isinstance(one, str):
            raise Malformed(f"{name}[{place}] is not a text")
    return found
