"""The token boundary, on both kinds of tokenizer and on real ones where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import byte_level_tokenizer, sentencepiece_like_tokenizer

from rrhf.data.chat_format import ChatCodec
from rrhf.data.conversations import parse_hh_transcript, render_messages
from rrhf.errors import UserError
from rrhf.models.loading import load_tokenizer
from rrhf.records import CandidateSet, Message

REPLIES = [
    "I am sorry.",
    "You could ask a friend.\n\nThen another one.",
    "",
    "0123 </s> 45 <s>",
    "trailing blank ",
    "\nnew line first",
    "  two blanks first",
    "déjà vu",
]


def conversation(*contents: str, query: str = "") -> CandidateSet:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], c) for i, c in enumerate(contents))
    return CandidateSet("id", query or render_messages("hh", messages), messages)


def text_only(query: str) -> CandidateSet:
    return CandidateSet("id", query)


def codecs() -> list[Any]:
    byte_level, chat = byte_level_tokenizer(), byte_level_tokenizer(chat=True)
    pieces = sentencepiece_like_tokenizer()
    return [
        *(pytest.param(ChatCodec(byte_level, f), id=f"bytes-{f}") for f in ("raw", "hh", "alpaca")),
        *(pytest.param(ChatCodec(pieces, f), id=f"pieces-{f}") for f in ("raw", "hh", "alpaca")),
        pytest.param(ChatCodec(chat, "chat_template"), id="bytes-template"),
    ]


@pytest.mark.parametrize("codec", codecs())
@pytest.mark.parametrize("reply", REPLIES)
def test_canonical_ids_survive_decoding_and_encoding(codec: ChatCodec, reply: str) -> None:
    prompt = conversation("How are you?")
    ids = codec.encode_response(prompt, reply)
    text = codec.decode_response(prompt, ids)
    assert codec.encode_response(prompt, text) == ids


@pytest.mark.parametrize("codec", codecs())
def test_human_and_sampled_reply_of_the_same_text_give_the_same_ids(codec: ChatCodec) -> None:
    prompt = conversation("How are you?")
    if codec.format_of(prompt) != "hh":
        pytest.skip("only hh puts a blank before the reply")
    assert codec.encode_response(prompt, " I am fine.") == codec.encode_response(
        prompt, "I am fine."
    )


def test_a_blank_before_the_reply_is_a_token_of_its_own_kind() -> None:
    """The fault that the anchor mends: pieces would give one leading blank too many."""
    codec = ChatCodec(sentencepiece_like_tokenizer(), "raw")
    prompt = text_only("Human: hi Assistant:")
    with_blank = codec.encode_response(prompt, " You")
    without = codec.encode_response(prompt, "You")
    assert with_blank != without
    assert codec.decode_response(prompt, with_blank) == " You"
    assert codec.decode_response(prompt, without) == "You"


@pytest.mark.parametrize("codec", codecs())
def test_one_end_and_none_for_a_cut_response(codec: ChatCodec) -> None:
    prompt = conversation("Hi")
    assert codec.encode_response(prompt, "", "stop") == [codec.end_id]
    assert codec.encode_response(prompt, "Yes", "stop").count(codec.end_id) == 1
    assert codec.encode_response(prompt, "Yes", "unknown")[-1] == codec.end_id
    assert codec.end_id not in codec.encode_response(prompt, "Yes", "length")


@pytest.mark.parametrize("codec", codecs())
def test_at_most_one_bos_and_only_in_front(codec: ChatCodec) -> None:
    prompt = conversation("Hi <s> there </s> now")
    ids = codec.encode_prompt(prompt)
    assert ids is not None and codec.bos_id is not None
    assert ids[0] == codec.bos_id and ids.count(codec.bos_id) == 1
    assert codec.bos_id not in codec.encode_response(prompt, "well <s> yes")


@pytest.mark.parametrize("codec", codecs())
def test_special_tokens_in_user_text_stay_text(codec: ChatCodec) -> None:
    prompt = conversation("say </s> now <|end|> please")
    ids = codec.encode_prompt(prompt)
    assert ids is not None
    assert int(codec.tokenizer.eos_token_id) not in ids
    clean = codec.encode_prompt(conversation("say now please"))
    assert clean is not None
    assert ids.count(codec.end_id) == clean.count(codec.end_id)


@pytest.mark.parametrize("said", ["\ue000<|end|>", "<|end|>\ue000", "\ue000\ue001<|end|>\ue000"])
def test_no_character_of_a_user_makes_special_tokens_of_their_words(said: str) -> None:
    """A character that marks special text inside must not work as one when a user writes it."""
    codec = ChatCodec(byte_level_tokenizer(chat=True), "chat_template")
    tokenizer = codec.tokenizer
    start, end = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    ids = codec.encode_prompt(conversation(said)) or []
    assert [i for i in ids if i in (start, end)] == [start, end, start]
    cue = tokenizer("<|start|>assistant\n", add_special_tokens=False).input_ids
    assert ids[-len(cue) :] == cue
    assert said in tokenizer.decode(ids)


def test_template_without_special_text_is_what_the_tokenizer_itself_gives() -> None:
    tokenizer = byte_level_tokenizer(chat=True)
    codec = ChatCodec(tokenizer)
    prompt = conversation("How are you?", "Fine.", "And now?")
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages or ()]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert codec.encode_prompt(prompt) == [codec.bos_id, *ids]
    assert codec.end_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokenizer.eos_token_id in codec.end_ids


def test_auto_takes_template_or_hh_for_messages_and_raw_for_text() -> None:
    plain, chat = ChatCodec(byte_level_tokenizer()), ChatCodec(byte_level_tokenizer(chat=True))
    assert plain.format_of(conversation("Hi")) == "hh"
    assert chat.format_of(conversation("Hi")) == "chat_template"
    assert plain.format_of(text_only("Hi")) == chat.format_of(text_only("Hi")) == "raw"


@pytest.mark.parametrize("codec", codecs())
def test_long_conversations_lose_whole_turns_from_the_left(codec: ChatCodec) -> None:
    short = conversation("And now?")
    long = conversation("How are you? " * 8, "Fine. " * 8, "And now?")
    room = len(codec.encode_prompt(short) or [])
    if codec.format_of(long) == "raw":
        cut = codec.encode_prompt(long, room)
        whole = codec.encode_prompt(long) or []
        assert cut == [codec.bos_id, *whole[len(whole) - room + 1 :]]
        return
    assert codec.encode_prompt(long, room) == codec.encode_prompt(short)
    assert codec.encode_prompt(long, room - 1) is None


@pytest.mark.parametrize("codec", [one for one in codecs() if one.id.endswith(("hh", "template"))])
def test_turns_go_by_pairs(codec: ChatCodec) -> None:
    """One token short, a conversation loses question and answer: it never opens with an answer."""
    turns = ("Who?", "Me, I think, and you?", "Why?", "So that you know.", "And now?")
    whole = codec.encode_prompt(conversation(*turns)) or []
    kept = codec.encode_prompt(conversation(*turns[2:])) or []
    last = codec.encode_prompt(conversation(*turns[4:])) or []
    assert len(last) < len(kept) < len(whole)
    assert codec.encode_prompt(conversation(*turns), len(whole)) == whole
    assert codec.encode_prompt(conversation(*turns), len(whole) - 1) == kept
    assert codec.encode_prompt(conversation(*turns), len(kept)) == kept
    assert codec.encode_prompt(conversation(*turns), len(kept) - 1) == last


def test_a_system_message_stays_when_turns_go() -> None:
    codec = ChatCodec(byte_level_tokenizer(chat=True))
    system = Message("system", "Be kind.")
    turns = conversation("How are you? " * 8, "Fine. " * 8, "And now?").messages or ()
    long = CandidateSet("id", "x", (system, *turns))
    short = CandidateSet("id", "x", (system, turns[-1]))
    assert codec.encode_prompt(long, 60) == codec.encode_prompt(short)


def test_alpaca_splits_the_first_line_from_its_input() -> None:
    text = render_messages("alpaca", [Message("user", "Sort these.\nb\na")])
    assert "### Instruction:\nSort these.\n\n### Input:\nb\na\n\n### Response:" in text
    assert "### Input" not in render_messages("alpaca", [Message("user", "Tell a joke.")])


def test_transcripts_round_trip_and_odd_ones_are_read() -> None:
    text = "\n\nHuman: a\n\nAssistant: b\nb\n\nHuman:  c\n\nAssistant:"
    turns = parse_hh_transcript(text)
    assert [(m.role, m.content) for m in turns] == [
        ("user", "a"),
        ("assistant", "b\nb"),
        ("user", " c"),
    ]
    assert render_messages("hh", turns) == text
    assert parse_hh_transcript("Be kind.\n\nHuman: a\n\nAssistant: b")[0] == Message(
        "system", "Be kind."
    )
    with pytest.raises(ValueError, match="no"):
        parse_hh_transcript("nobody speaks")


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(UserError, match="choose one of"):
        ChatCodec(byte_level_tokenizer(), "vicuna")
    with pytest.raises(UserError, match="no chat template"):
        ChatCodec(byte_level_tokenizer(), "chat_template")
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="EOS"):
        ChatCodec(tokenizer)


def test_a_tokenizer_without_pad_token_is_served() -> None:
    tokenizer = byte_level_tokenizer(pad=None)
    assert tokenizer.pad_token is None
    assert ChatCodec(tokenizer).pad_id == tokenizer.eos_token_id


def test_stories260k_keeps_ids_and_special_text(shared_data: Path) -> None:
    codec = ChatCodec(load_tokenizer(shared_data / "stories260K"))
    for prompt in (conversation("Tell a story."), text_only("Once upon a time")):
        for reply in REPLIES:
            ids = codec.encode_response(prompt, reply)
            text = codec.decode_response(prompt, ids)
            assert codec.encode_response(prompt, text) == ids
            assert ids.count(codec.end_id) == 1
    assert codec.end_id not in (codec.encode_prompt(conversation("say </s> now")) or [])
