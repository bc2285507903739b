"""One row: RRHF's published form unchanged, every mistake with its field, oddities accepted."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest

from rrhf.data import candidate_rows
from rrhf.data.candidate_rows import (
    RowError,
    candidate_set_to_row,
    parse_candidate_set,
    with_scores,
)
from rrhf.data.jsonl import encode_row
from rrhf.records import Candidate, CandidateSet, Message, set_id

PUBLISHED = {
    "query": "\n\nHuman: Hi\n\nAssistant:",
    "responses": [" a", " b"],
    "scores": [0.5, -1.0],
}


def faults(row: object) -> list[str]:
    with pytest.raises(RowError) as caught:
        parse_candidate_set(row, "f.json:7")
    assert str(caught.value) == "\n".join(caught.value.faults)
    for line in caught.value.faults:
        assert line.startswith("f.json:7: ")
    return [line.removeprefix("f.json:7: ") for line in caught.value.faults]


def test_a_published_row_reads_as_it_stands_and_writes_back_the_same():
    found = parse_candidate_set(PUBLISHED, "f:1")
    assert found.query == PUBLISHED["query"] and found.messages is None
    assert found.candidates == (Candidate(" a", score=0.5), Candidate(" b", score=-1.0))
    assert found.id == set_id(found.query)
    assert json.dumps(candidate_set_to_row(found)) == json.dumps(PUBLISHED)


def test_keys_that_are_not_known_are_left_alone():
    odd = {**PUBLISHED, "origin_scores": [[1, 2]], "tag": float("nan"), "0": None}
    assert parse_candidate_set(odd, "f:1") == parse_candidate_set(PUBLISHED, "f:1")


def test_every_optional_key_survives_writing_and_reading():
    whole = CandidateSet(
        id="mine",
        query="q",
        messages=(Message("system", "s"), Message("user", "u")),
        candidates=(
            Candidate("a", "policy:x", 1.0, "stop"),
            Candidate("", "human:chosen", None, "length"),
            Candidate("c"),
        ),
        origin="somewhere",
    )
    row = candidate_set_to_row(whole)
    assert list(row)[:3] == ["query", "responses", "scores"]
    assert parse_candidate_set(json.loads(json.dumps(row)), "f:1") == whole


def test_optional_keys_stand_only_where_they_say_something():
    bare = CandidateSet(set_id("q"), "q", None, (Candidate("a"), Candidate("b")))
    assert candidate_set_to_row(bare) == {"query": "q", "responses": ["a", "b"]}


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "responses": []},
        {"query": "q", "responses": ["only one"], "scores": [1]},
        {"query": "q", "responses": ["", " "], "scores": [1, 1]},
        {"query": "q", "responses": ["a", "a"]},
        {"query": "q", "responses": ["a", "b"], "scores": None},
        {"query": "q", "responses": ["a", "b"], "scores": [None, 2]},
        {"query": "q", "responses": ["a"], "messages": None, "id": None, "origin": None},
        {"query": "q", "responses": ["a"], "sources": [None], "finish_reasons": None},
        {"query": "", "responses": ["\x00\u2028"]},
    ],
)
def test_what_is_not_a_mistake(row: dict):
    parse_candidate_set(row, "f:1")


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"query": 3}, "query", "must be a text, is the number 3"),
        ({"query": None}, "query", "must be a text, is null"),
        ({"query": "\ud83d!"}, "query", r"half a surrogate pair (\ud83d at character 1)"),
        ({"responses": "a"}, "responses", "must be a list of texts, is the text"),
        ({"responses": ["a", None]}, "responses[1]", "must be a text, is null"),
        ({"responses": ["a", ["b"]]}, "responses[1]", "must be a text, is a list"),
        ({"responses": ["x\udc00", "b"]}, "responses[0]", "half a surrogate pair"),
        ({"scores": [1.0]}, "scores", "holds 1 entries for 2 responses"),
        ({"scores": [1.0, 2.0, 3.0]}, "scores", "holds 3 entries for 2 responses"),
        ({"scores": 1.0}, "scores", "must be a list of numbers, is the number 1.0"),
        ({"scores": [1.0, "2"]}, "scores[1]", "must be a number or null, is the text"),
        ({"scores": [True, 2]}, "scores[0]", "must be a number or null, is true"),
        ({"scores": [float("nan"), 2]}, "scores[0]", "is nan, not a finite number"),
        ({"scores": [1, float("-inf")]}, "scores[1]", "is -inf, not a finite number"),
        ({"scores": [1, 10**400]}, "scores[1]", "not a finite number"),
        ({"id": 5}, "id", "must be a text"),
        ({"origin": ["x"]}, "origin", "must be a text"),
        ({"sources": ["x"]}, "sources", "holds 1 entries for 2 responses"),
        ({"sources": ["x", 1]}, "sources[1]", "must be a text"),
        ({"finish_reasons": ["stop", "eos"]}, "finish_reasons[1]", "must be one of stop, length"),
        ({"finish_reasons": ["stop", {}]}, "finish_reasons[1]", "must be one of stop, length"),
        ({"messages": []}, "messages", "an empty list"),
        ({"messages": "hi"}, "messages", "must be a list"),
        ({"messages": [3]}, "messages[0]", 'must be {"role", "content"}'),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "must be one of"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role", "must be one of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a text, is null"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "messages",
            "end with the turn of the assistant",
        ),
    ],
)
def test_every_mistake_names_its_field_and_mend(change: dict, field: str, says: str):
    found = faults({**PUBLISHED, **change})
    assert len(found) == 1
    assert found[0].startswith(f"{field}: ") and says in found[0]
    assert re.search("; |must be one of|belongs in", found[0])


@pytest.mark.parametrize("field", ["query", "responses"])
def test_a_missing_key(field: str):
    row = {key: value for key, value in PUBLISHED.items() if key not in (field, "scores")}
    assert faults(row)[0].startswith(f"{field}: is missing")


def test_other_peoples_rows_get_a_hint():
    assert "`rrhf data convert` reads it" in faults({"prompt": "p", "responses": []})[0]


def test_all_mistakes_of_a_row_are_told():
    found = faults({"query": 1, "responses": [2, "b"], "scores": [float("nan"), "x"], "id": 3})
    assert [line.split(": ")[0] for line in found] == [
        "query",
        "responses[0]",
        "scores[0]",
        "scores[1]",
        "id",
    ]


@pytest.mark.parametrize("row", [None, 3, "text", [1, 2], True])
def test_a_row_that_is_no_object(row: object):
    assert faults(row)[0].startswith("row: must be an object")


# Rows are read at once, and looked at field by field where that fails: both must agree.

_ODD: list[Any] = [
    None,
    0,
    True,
    False,
    "",
    [],
    {},
    "x",
    "ab",
    1.5,
    float("nan"),
    float("inf"),
    10**400,
    -3,
]
_ODD += [
    ["a"],
    [None, "u"],
    "\ud800",
    {"a": 1},
    ["stop", "length"],
    [0, 1],
    1e305,
    {"a": 1, "b": 2},
]


def _turn(draw: random.Random) -> Any:
    turn = {"role": draw.choice(["user", "assistant", "x", None, ["user"]]), "content": "é"}
    odd = ["text", 3, {"role": "user"}, {**turn, "content": draw.choice([None, 3, "\ud800"])}]
    return draw.choice([turn, {"role": "user", "content": "x", "name": 3}, *odd])


def _random_row(draw: random.Random) -> dict[str, Any]:
    row = {
        "query": draw.choice(["q", "é"]),
        "responses": draw.choices(["a", "b", "", "é"], k=draw.randrange(4)),
        "scores": draw.choices([1, 2.5, None, -1], k=draw.randrange(4)),
        "messages": draw.choice([[{"role": "user", "content": "q"}], [_turn(draw)]]),
        "id": "i",
        "origin": "o",
        "sources": draw.choices(["s", None, ""], k=draw.randrange(4)),
        "finish_reasons": draw.choices(["stop", "length", "unknown"], k=draw.randrange(4)),
        "more": 1,
    }
    likely = {"query": 0.95, "responses": 0.95, "more": 0.02}
    return {
        name: draw.choice(_ODD) if draw.random() < 0.1 else value
        for name, value in row.items()
        if draw.random() < likely.get(name, 0.4)
    }


def test_a_row_is_a_record_just_where_no_fault_is_found():
    draw, num_records = random.Random(5), 0
    for _ in range(5000):
        row = _random_row(draw)
        found = candidate_rows._record(row)
        try:
            assert repr(parse_candidate_set({**row, "more": 1}, "f:1")) == repr(found), row
            num_records += 1
        except RowError:
            assert found is None, row
    assert num_records > 500


_PIECES = [
    "a",
    '], "messages": ',
    '], "scores": [1]',
    "x], ",
    '"]}\n',
    "\\",
    "\u2028é",
    "]}",
    '], "id": "',
]


def test_scores_are_put_into_a_line_as_a_row_would_be_written_with_them():
    draw = random.Random(1)

    def text() -> str:
        return "".join(draw.choices(_PIECES, k=draw.randrange(4)))

    for _ in range(3000):
        count = draw.randrange(4)
        scores = draw.choices([None, None, 1.5, -2.0], k=count)
        new = draw.choices([None, 3.5, 1e-9], k=count)
        candidates = [
            Candidate(text(), draw.choice(["", text()]), score, draw.choice(["stop", "unknown"]))
            for score in scores
        ]
        messages = draw.choice([None, (Message("user", text()),)])
        before = CandidateSet("", text(), messages, tuple(candidates), draw.choice(["", text()]))
        before = replace(before, id=draw.choice([text() or "i", set_id(before.query, messages)]))
        after = replace(
            before,
            candidates=tuple(replace(c, score=x) for c, x in zip(candidates, new, strict=True)),
        )
        line = encode_row(candidate_set_to_row(before))
        given = None if new.count(None) == count else encode_row(new)[:-1]
        assert with_scores(line, given) == encode_row(candidate_set_to_row(after))


def test_an_id_that_is_made_when_it_is_read_is_an_id_as_any_other() -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]

    def found() -> CandidateSet:
        return parse_candidate_set({**PUBLISHED, "messages": turns}, "f:1")

    assert "id" not in vars(found()), "few readers of many rows need it"
    known = found()
    assert known.id == set_id(known.query, known.messages) == vars(known)["id"]
    assert known == found() and hash(known) == hash(found()) and repr(known) == repr(found())
    assert replace(found(), origin="x").id == known.id
    assert pickle.loads(pickle.dumps(found())) == copy.deepcopy(found()) == known
    with pytest.raises(AttributeError, match="'CandidateSet' object has no attribute 'ids'"):
        _ = found().ids  # type: ignore[attr-defined]
    with pytest.raises(FrozenInstanceError):
        known.id = "x"  # type: ignore[misc]


def _lazy_and_made(**more: object) -> tuple[CandidateSet, CandidateSet]:
    """A set as a row gives it, and the same set made by its constructor."""
    turns = (Message("user", "hi"), Message("assistant", "yes?"), Message("user", "why?"))
    row = {"query": "q", "responses": ["a", "b"], "scores": [1, None], "sources": ["x", None]}
    row |= {"messages": [{"role": m.role, "content": m.content} for m in turns]}
    made = CandidateSet(
        set_id("q", turns), "q", turns, (Candidate("a", "x", 1.0), Candidate("b")), "o"
    )
    return parse_candidate_set(row | {"origin": "o"} | more, "f:1"), made


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s,
        lambda s: s.candidates,
        lambda s: s.messages,
        lambda s: (s.responses, s.conversation, s.scores, s.is_plain),
        lambda s: pickle.loads(pickle.dumps(s)),
        lambda s: copy.deepcopy(s),
        lambda s: replace(s, candidates=s.candidates[:1]),
        lambda s: replace(s, messages=None).conversation,
        lambda s: replace(s, candidates=()).responses,
        hash,
        repr,
        asdict,
    ],
)
def test_a_set_read_from_a_row_is_like_one_made_by_its_constructor(use):
    lazy, made = _lazy_and_made()
    assert use(lazy) == use(made)
    assert lazy == made


def test_conversations_are_new_dictionaries():
    lazy, made = _lazy_and_made()
    lazy.conversation[0]["content"] = "changed"
    assert lazy.messages == made.messages


def test_a_misspelt_attribute_is_refused():
    with pytest.raises(AttributeError, match="candidate_sets"):
        _ = _lazy_and_made()[0].candidate_sets
