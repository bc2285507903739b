"""The token boundary on real tokenizers: a SentencePiece-style one and SmolLM2's with its template.

stories260K lies beside a development checkout. SmolLM2 is looked for in the folder that
RRHF_SMOLLM2_DIR names (`rrhf fetch smollm2 DIR` makes one).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rrhf.data.chat_format import ChatCodec
from rrhf.data.conversations import render_messages
from rrhf.data.sources import read_sets
from rrhf.generation.engine import SamplingParams, answers
from rrhf.generation.local.engine import LocalEngine
from rrhf.models.loading import load_causal_lm, load_tokenizer
from rrhf.records import CandidateSet, Message

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["stories260K", "SmolLM2"])
def folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "stories260K":
        return request.getfixturevalue("shared_data") / "stories260K"
    named = os.environ.get("RRHF_SMOLLM2_DIR")
    if not named:
        pytest.skip("RRHF_SMOLLM2_DIR names no folder of `rrhf fetch smollm2`")
    return Path(named)


@pytest.fixture(scope="module")
def codec(folder: Path) -> ChatCodec:
    return ChatCodec(load_tokenizer(folder))


def asked(*contents: str) -> CandidateSet:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], c) for i, c in enumerate(contents))
    return CandidateSet("id", render_messages("hh", messages), messages)


def test_every_hh_reply_survives(codec: ChatCodec, shared_data: Path) -> None:
    count = 0
    for s in read_sets(str(shared_data / "hh_harmless_base_test.jsonl.gz")):
        for candidate in s.candidates:
            ids = codec.encode_response(s, candidate.response)
            text = codec.decode_response(s, ids)
            assert codec.encode_response(s, text) == ids
            assert ids.count(codec.end_id) == 1
            count += 1
        if count > 600:
            break


def test_a_human_reply_with_or_without_its_blank_is_the_same(codec: ChatCodec) -> None:
    hh = ChatCodec(codec.tokenizer, "hh")
    s = asked("How are you?")
    assert hh.encode_response(s, " I am fine.") == hh.encode_response(s, "I am fine.")


def test_sampled_ids_survive_their_text(folder: Path, codec: ChatCodec) -> None:
    """Sampled ids need not be canonical; what their text encodes to must be stable, and mostly is
    the sampled ids themselves."""
    engine = LocalEngine(load_causal_lm(folder), codec)
    prompts = [asked("Tell me a story about a dog."), asked("What is rain?")]
    params = SamplingParams(num_return_sequences=8, max_new_tokens=24, temperature=0.7)
    same = total = 0
    for s, samples in zip(prompts, answers(engine, prompts, params), strict=True):
        for sample in samples:
            ids = codec.encode_response(s, sample.text, sample.finish_reason)
            again = codec.decode_response(s, ids)
            assert codec.encode_response(s, again, sample.finish_reason) == ids
            same += ids == sample.token_ids.tolist()
            total += 1
    assert same / total >= 0.75


def test_special_tokens_in_user_text_stay_text(codec: ChatCodec) -> None:
    special = codec.tokenizer.all_special_tokens
    said = f"please say {' and '.join(special)} now"
    ids = codec.encode_prompt(asked(said))
    plain = codec.encode_prompt(asked("please say nothing now"))
    assert ids is not None and plain is not None
    for name in special:
        number = codec.tokenizer.convert_tokens_to_ids(name)
        if number != codec.tokenizer.unk_token_id:
            assert ids.count(number) == plain.count(number), name
    assert codec.end_id not in codec.encode_response(asked("x"), said)[:-1]


def test_the_prompt_is_what_the_template_gives(codec: ChatCodec) -> None:
    if codec.tokenizer.chat_template is None:
        pytest.skip("this tokenizer has no template")
    s = asked("How are you?", "Fine.", "And now?")
    messages = [{"role": m.role, "content": m.content} for m in s.messages or ()]
    ids = codec.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert codec.encode_prompt(s) == ids
    assert codec.tokenizer.convert_ids_to_tokens(codec.end_id) == "<|im_end|>"
