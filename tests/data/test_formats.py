"""Every format gives the record it means; what is of no use is dropped, counted."""

from __future__ import annotations

import pytest

from rrhf.data.candidate_rows import RowError
from rrhf.data.formats import FORMATS, SourceCounts, find_format, read_row
from rrhf.errors import UserError
from rrhf.records import CHOSEN_SOURCE, REJECTED_SOURCE, CandidateSet, Message, set_id

HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
HH_TURNS = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye"))


def read(row: dict, counts: SourceCounts | None = None) -> CandidateSet | None:
    return read_row(find_format(row, "f:1"), row, "f:1", counts or SourceCounts())


def kept(row: dict) -> CandidateSet:
    counts = SourceCounts()
    found = read(row, counts)
    assert found is not None and counts.kept == counts.read == 1 and not counts.dropped
    return found


def replies(found: CandidateSet) -> list[tuple[str, str]]:
    return [(candidate.source, candidate.response) for candidate in found.candidates]


def pair(better: str, worse: str) -> list[tuple[str, str]]:
    return [(CHOSEN_SOURCE, better), (REJECTED_SOURCE, worse)]


def chat(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


# Pairs.


def test_hh_transcripts_become_messages_and_bare_replies():
    found = kept({"chosen": HH + " Good bye", "rejected": HH + " Go"})
    assert found.messages == HH_TURNS
    assert found.query == HH
    assert replies(found) == pair("Good bye", "Go")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (HH + " a", "\n\nHuman: Else\n\nAssistant: b", "prompts_differ"),
        (HH + " ", HH + " b", "empty_reply"),
        (HH + " a", HH, "empty_reply"),
        (HH + " a", HH + " a ", "equal_replies"),
        (
            "\n\nHuman: Hi\n\nAssistant: one\n\nAssistant: two",
            "\n\nHuman: Hi\n\nAssistant: one\n\nAssistant: 2",
            "prompt_ends_with_assistant",
        ),
    ],
)
def test_pairs_of_no_use_are_dropped_and_counted(chosen: str, rejected: str, reason: str):
    counts = SourceCounts()
    assert read({"chosen": chosen, "rejected": rejected}, counts) is None
    assert counts.dropped == {reason: 1}
    assert counts.as_dict()["rows_kept"] == 0 and counts.as_dict()["rows_read"] == 1


def test_a_reply_of_white_space_is_empty():
    counts = SourceCounts()
    assert read({"prompt": "p", "chosen": "a", "rejected": " \n"}, counts) is None
    assert counts.dropped == {"empty_reply": 1}


def test_neighbouring_turns_of_one_speaker_are_joined():
    prompt = "\n\nHuman: One\n\nHuman: Two\n\nAssistant:"
    counts = SourceCounts()
    found = read({"chosen": prompt + " a", "rejected": prompt + " b"}, counts)
    assert found is not None
    assert found.messages == (Message("user", "One\n\nTwo"),)
    assert counts.mended == {"joined_turns": 1} and counts.kept == 1


def test_only_the_first_of_each_kind_is_logged(caplog: pytest.LogCaptureFixture):
    counts = SourceCounts()
    with caplog.at_level("INFO"):
        for line in (1, 2, 3):
            row = {"chosen": HH + " secret text", "rejected": HH + " secret text"}
            read_row(find_format(row, "f"), row, f"f:{line}", counts)
    assert counts.dropped == {"equal_replies": 3}
    assert caplog.text.count("equal_replies") == 1 and "f:1" in caplog.text
    assert "secret" not in caplog.text


def test_trl_texts_are_taken_as_they_are():
    found = kept({"prompt": "Say", "chosen": " yes", "rejected": " no"})
    assert found.is_plain and found.query == "Say"
    assert replies(found) == pair(" yes", " no")


def test_trl_texts_that_hold_an_hh_prompt_become_messages():
    for lead in ("", HH):  # the replies alone, or the whole text again
        found = kept({"prompt": HH, "chosen": lead + " yes", "rejected": lead + " no"})
        assert found.messages == HH_TURNS and replies(found) == pair("yes", "no")


def test_trl_conversations():
    prompt, turns = chat(("user", "Hi")), (Message("user", "Hi"),)
    yes, no = chat(("assistant", "yes")), chat(("assistant", "no"))
    for row in (
        {"prompt": prompt, "chosen": yes, "rejected": no},
        {"chosen": prompt + yes, "rejected": prompt + no},
        {"prompt": "Hi", "chosen": prompt + yes, "rejected": prompt + no, "messages": []},
        {"prompt": "Hi", "chosen": yes, "rejected": no},
        {"prompt": prompt, "chosen": "yes", "rejected": "no"},
    ):
        found = kept(row)
        assert found.messages == turns and replies(found) == pair("yes", "no"), row
    system = chat(("system", "Be kind"))
    assert kept({"prompt": system + prompt, "chosen": yes, "rejected": no}).messages == (
        Message("system", "Be kind"),
        *turns,
    )


@pytest.mark.parametrize("better", [0, 1, 0.0, 1.0])
def test_numbered_preferences(better: float):
    row = {"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": better}
    found = kept({**row, "is_response_0_safe": True})
    assert found.messages == (Message("user", "Q"),)
    assert replies(found) == (pair("b", "a") if better else pair("a", "b"))


def test_raw_samples():
    both = {"input": "Q", "answer": "a", "other_answer": "b"}
    assert replies(kept({**both, "better": True})) == pair("a", "b")
    assert replies(kept({**both, "better": False})) == pair("b", "a")
    assert replies(kept({"input": "Q", "answer": "a", "other_answer": None})) == pair("a", "")[:1]
    assert kept({"input": "Q"}).candidates == ()
    turns = kept({"input": ["Hi", "Hello", "Bye"], "answer": "x"})
    assert turns.messages == HH_TURNS
    spoken = kept({"dialogue": ["Hi", "Hello", "Bye", "So long"]})
    assert spoken.messages == HH_TURNS and replies(spoken) == [(CHOSEN_SOURCE, "So long")]


# Demonstrations and prompts.


def test_alpaca():
    found = kept({"instruction": "Add", "input": "1 2", "output": "3", "text": "ignored"})
    assert found.messages == (Message("user", "Add\n1 2"),)
    assert found.query.endswith("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:")
    assert replies(found) == [(CHOSEN_SOURCE, "3")]
    without = kept({"instruction": "Sing", "input": "", "output": "La"})
    assert without.messages == (Message("user", "Sing"),) and "### Input" not in without.query
    assert kept({"instruction": "Sing"}).candidates == ()


def test_messages_end_with_a_demonstration_or_are_a_prompt():
    told = kept({"messages": chat(("user", "Hi"), ("assistant", "Hello"))})
    assert told.messages == (Message("user", "Hi"),)
    assert replies(told) == [(CHOSEN_SOURCE, "Hello")]
    asked = kept({"messages": chat(("system", "s"), ("user", "Hi"))})
    assert asked.candidates == () and len(asked.messages or ()) == 2


def test_completions():
    plain = kept({"prompt": "2 + 2 =", "completion": " 4"})
    assert plain.is_plain and replies(plain) == [(CHOSEN_SOURCE, " 4")]
    spoken = kept({"prompt": chat(("user", "Hi")), "completion": chat(("assistant", "Hello"))})
    assert spoken.messages == (Message("user", "Hi"),)
    assert replies(spoken) == [(CHOSEN_SOURCE, "Hello")]
    assert replies(kept({"prompt": HH, "completion": " x"})) == [(CHOSEN_SOURCE, "x")]


def test_prompts():
    assert kept({"prompt": "raw"}).query == "raw"
    assert kept({"prompt": "raw"}).is_plain
    assert kept({"prompt": "raw"}).id == set_id("raw")  # as of a text that is taken as it is
    assert kept({"prompt": HH}).messages == HH_TURNS
    assert kept({"prompt": chat(("user", "Hi"))}).messages == (Message("user", "Hi"),)
    assert kept({"query": HH}).messages is None  # a candidate row's query is never interpreted


def test_rrhfs_scored_prompts():
    found = kept({"prompt": HH, "response": [" a", " b"], "scores": [1, 2]})
    assert found.query == HH and found.scores == (1.0, 2.0)


def test_an_empty_reply_of_a_candidate_file_is_kept():
    found = kept({"query": "q", "responses": ["", "a"], "scores": [0, 1]})
    assert len(found.candidates) == 2


# Mistakes.


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"chosen": 3, "rejected": HH}, "chosen"),
        ({"chosen": "no transcript", "rejected": HH}, "chosen"),
        ({"chosen": HH, "rejected": None}, "rejected"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "p", "chosen": chat(("bot", "x")), "rejected": []}, "chosen[0].role"),
        ({"prompt": "p", "chosen": chat(("assistant", "x")), "rejected": []}, "rejected"),
        ({"prompt": "p", "response_0": "", "response_1": 1, "better_response_id": 0}, "response_1"),
        (
            {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 2},
            "better_response_id",
        ),
        (
            {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": True},
            "better_response_id",
        ),
        ({"input": ["a", "b"]}, "input"),
        ({"input": []}, "input"),
        ({"input": None}, "dialogue"),
        ({"input": "q", "answer": "a", "other_answer": "b"}, "better"),
        ({"input": "q", "other_answer": "b", "better": True}, "answer"),
        ({"instruction": None}, "instruction"),
        ({"instruction": "i", "output": 3}, "output"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "p", "completion": None}, "completion"),
        ({"query": "q", "scores": [1]}, "responses"),
        ({"query": None}, "query"),
    ],
)
def test_a_row_of_wrong_types_is_a_mistake_not_a_drop(row: dict, field: str):
    counts = SourceCounts()
    with pytest.raises(RowError) as caught:
        read(row, counts)
    assert any(line.startswith(f"f:1: {field}: ") for line in caught.value.faults)
    assert not counts.dropped and counts.kept == 0


def test_columns_that_nobody_knows_are_named_beside_those_that_are():
    with pytest.raises(UserError) as caught:
        find_format({"qestion": "q", "body": "r"}, "f:1")
    assert "(qestion (did you mean 'question'?), body)" in str(caught.value)
    for row_format in FORMATS:
        assert ", ".join(row_format.columns) in str(caught.value)


@pytest.mark.parametrize("row", [None, [1], "text", 3])
def test_a_first_row_that_is_no_object(row: object):
    with pytest.raises(UserError, match="must be an object"):
        find_format(row, "f:1")


def test_later_rows_follow_the_first():
    row_format = find_format({"chosen": HH, "rejected": HH}, "f:1")
    with pytest.raises(RowError, match="f:2: rejected: is missing"):
        read_row(row_format, {"chosen": HH}, "f:2", SourceCounts())
    with pytest.raises(RowError, match="must be an object"):
        read_row(row_format, 3, "f:3", SourceCounts())
    query = find_format({"query": "q"}, "f:1")
    with pytest.raises(RowError, match="missing in the file's first row"):
        read_row(query, {"query": "q", "responses": []}, "f:2", SourceCounts())


Q, A, B = ("user", "q"), ("assistant", "a"), ("assistant", "b")


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat(Q)},
        {"messages": chat(Q, A)},
        {"messages": chat(Q), "answer": "a"},
        {"prompt": chat(Q), "chosen": chat(A), "rejected": chat(B)},
        {"prompt": chat(Q), "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": chat(A), "rejected": chat(B)},
        {"prompt": "q", "chosen": chat(Q, A), "rejected": chat(Q, B)},
        {"chosen": chat(Q, A), "rejected": chat(Q, B)},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": chat(Q), "completion": chat(A)},
        {"dialogue": ["q", "a"]},
        {"input": "q", "output": "a"},
    ],
)
def test_a_system_column_comes_first_in_every_conversation(row: dict, column: str):
    counts = SourceCounts()
    found = read({**row, column: "Be kind."}, counts)
    assert found is not None
    assert found.messages == (Message("system", "Be kind."), Message("user", "q"))
    assert [c.response for c in found.candidates] in (["a"], ["a", "b"], [])
    assert column not in counts.unread[""]


def test_turns_with_a_system_turn_keep_it_and_the_column_is_named():
    counts = SourceCounts()
    found = read({"messages": chat(("system", "own"), Q, A), "system": "other"}, counts)
    assert found is not None
    assert found.messages == (Message("system", "own"), Message("user", "q"))
    assert counts.unread[""] == ["system"]


T = "\n\nHuman: q\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": chat(Q), "chosen": chat(Q, A), "rejected": chat(Q, B)},
        {"prompt": chat(Q), "chosen": chat(Q, A), "rejected": chat(B)},
        {"prompt": "q", "chosen": f"{T}a", "rejected": f"{T}b"},
        {"question": "q", "chosen": f"{T}a", "rejected": f"{T}b"},
        {"prompt": chat(Q), "completion": chat(Q, A)},
        {"prompt": "q", "completion": chat(Q, A)},
    ],
)
@pytest.mark.parametrize("system", [None, "s"])
def test_a_prompt_that_the_replies_repeat_is_not_doubled(row: dict, system: str | None):
    found = kept({**row, "system": system})
    first = (Message("system", "s"),) if system else ()
    assert found.messages == (*first, Message("user", "q"))
    assert replies(found) == pair("a", "b")[: len(found.candidates)]


def test_an_empty_list_of_replies_has_been_read():
    row = {"instruction": "q", "completions": [], "correct_answers": ["None"]}
    assert kept(row).candidates == ()


@pytest.mark.parametrize(
    ("entries", "field"),
    [
        ([chat(A, ("user", "b"))], "responses[0][1].role"),
        (
            [[{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]],
            "responses[0][1].role",
        ),
        ([[{"content": "a"}]], "responses[0][0].role"),
        ([{"text": "a", "score": 1}, {"text": "b", "reward": 2}], "responses[1].score"),
        ([{"text": "a", "rank": 1}, {"text": "b", "rating": 2}], "responses[0].rating"),
    ],
)
def test_a_reply_that_is_not_the_assistants_or_scored_otherwise_is_a_mistake(
    entries: list, field: str
):
    with pytest.raises(RowError) as caught:
        read({"prompt": "p", "responses": entries})
    assert caught.value.faults[0].startswith(f"f:1: {field}: is ")


def test_the_last_turn_of_a_reply_is_read_in_either_form():
    turn = {"from": "gpt", "value": "b"}
    found = kept({"prompt": "q", "responses": [chat(Q, A), [turn]]})
    assert [c.response for c in found.candidates] == ["a", "b"]
