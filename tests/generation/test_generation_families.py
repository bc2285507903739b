"""Every family of models through the engine: greedy, sampled, by beams."""

from __future__ import annotations

import copy
import logging
from itertools import chain

import pytest
import torch
from decoder_cases import CONFIGS, model_of, random_ids
from transformers import LlamaConfig

from rrhf.generation.engine import SamplingParams
from rrhf.generation.engine import answers as all_answers
from rrhf.generation.local import decoders
from rrhf.generation.local.decoders import Verdict, decoding
from rrhf.generation.local.engine import LocalEngine
from rrhf.generation.local.incremental import IncrementalModel
from rrhf.generation.local.shared_prompt import SharedPromptModel
from rrhf.records import CandidateSet

END, PAD = 2, 0


class IdCodec:
    """A codec whose prompts are ids already; texts are ids too."""

    pad_id, end_ids = PAD, frozenset([END])

    def __init__(self, prompts) -> None:
        self.prompts = prompts

    def encode_prompt(self, prompt, room):
        return self.prompts[int(prompt.id)]

    def stop_strings(self, prompt):
        return ()

    def decode_tail(self, ids):
        return " ".join(map(str, ids))

    def decode_response(self, prompt, ids):
        return self.decode_tail(ids)


@pytest.fixture
def prompts() -> list[list[int]]:
    torch.manual_seed(3)
    return [[3 + token % 60 for token in random_ids(length)] for length in (5, 12, 3, 9, 7)]


def engine_of(model, prompts, rows: int) -> LocalEngine:
    return LocalEngine(model, IdCodec(prompts), rows)


def answers(engine, params):
    sets = [CandidateSet(str(place), "") for place in range(len(engine.codec.prompts))]
    return all_answers(engine, sets, params)


def tokens_of(found):
    return [[sample.token_ids.tolist() for sample in samples] for samples in found]


def plainly(model):
    """The model, sent the plain way."""
    decoders._VERDICTS[model] = Verdict("a test wants it so")
    return model


def decoder_of(model):
    with decoding(model, PAD, 40) as new:
        return type(new())


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_equals_transformers_token_for_token(kind, prompts):
    model = model_of(CONFIGS[kind])
    params = SamplingParams(num_return_sequences=1, do_sample=False, max_new_tokens=20)
    found = tokens_of(answers(engine_of(model, prompts, 3), params))
    for ids, (response,) in zip(prompts, found, strict=True):
        expected = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=20,
            min_new_tokens=1,
            eos_token_id=END,
            pad_token_id=PAD,
        )[0, len(ids) :].tolist()
        assert response == expected


@pytest.mark.parametrize("kind", CONFIGS)
def test_samples_and_beams_are_those_of_plain_rows(kind, prompts):
    """In float64, where rounding cannot turn a draw; eager attention knows padding in float32."""
    model = model_of(CONFIGS[kind])
    if model.config._attn_implementation == "sdpa":
        model.double()
    same = plainly(copy.deepcopy(model))
    sampled = SamplingParams(num_return_sequences=3, max_new_tokens=20)
    beams = SamplingParams(
        num_return_sequences=4,
        do_sample=False,
        num_beams=4,
        num_beam_groups=2,
        diversity_penalty=0.7,
        max_new_tokens=12,
    )
    for params, rows in ((sampled, 6), (beams, 8)):
        found = answers(engine_of(model, prompts, rows), params)
        assert decoder_of(model) is SharedPromptModel
        expected = answers(engine_of(same, prompts, 64), params)
        assert tokens_of(found) == tokens_of(expected)
        for mine, theirs in zip(chain(*found), chain(*expected), strict=True):
            torch.testing.assert_close(mine.logprobs, theirs.logprobs, atol=1e-5, rtol=1e-5)


def test_prompts_whose_search_is_over_are_released(prompts, monkeypatch):
    model = model_of(CONFIGS["gpt2"])
    released: list[int] = []
    monkeypatch.setattr(
        SharedPromptModel, "release", lambda self, handles: released.extend(handles)
    )
    params = SamplingParams(
        num_return_sequences=1, do_sample=False, num_beams=2, max_new_tokens=60, length_penalty=0.0
    )
    lengths = [len(ids) for (ids,) in tokens_of(answers(engine_of(model, prompts, 15), params))]
    assert len(set(lengths)) > 1 and 0 < len(released) < 5


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_log_probs_are_those_of_a_plain_forward(kind, prompts):
    model = model_of(CONFIGS[kind])
    params = SamplingParams(num_return_sequences=2, max_new_tokens=20, temperature=0.9)
    for ids, samples in zip(prompts, answers(engine_of(model, prompts, 5), params), strict=True):
        for sample in samples:
            logits = model(torch.tensor([[*ids, *sample.token_ids.tolist()]])).logits[0]
            logprobs = (logits[len(ids) - 1 : -1] / 0.9).log_softmax(-1)
            expected = logprobs.gather(-1, sample.token_ids[:, None])[:, 0]
            torch.testing.assert_close(sample.logprobs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_half_precision_goes_the_shared_way(way, prompts, caplog):
    model = model_of(CONFIGS["llama"])
    params = SamplingParams(num_return_sequences=3, max_new_tokens=20)
    wanted = answers(engine_of(model, prompts, 15), params)
    decoders._VERDICTS.pop(model)
    if way == "weights":
        model = model.bfloat16()
    with (
        caplog.at_level(logging.WARNING),
        torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"),
    ):
        found = answers(engine_of(model, prompts, 15), params)
    assert not caplog.records and decoders._VERDICTS[model].misfit is None
    pairs = zip(chain(*found), chain(*wanted), strict=True)
    first = [(float(m.logprobs[0]), float(t.logprobs[0])) for m, t in pairs]
    assert sum(abs(mine - theirs) < 0.1 for mine, theirs in first) > 0.7 * len(first)


def test_adapters_are_served(prompts, caplog):
    peft = pytest.importorskip("peft")
    model = model_of(CONFIGS["llama"])
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    params = SamplingParams(num_return_sequences=2, max_new_tokens=10)
    with caplog.at_level(logging.WARNING):
        found = tokens_of(answers(engine_of(adapted, prompts, 4), params))
    assert not caplog.records
    merged = plainly(copy.deepcopy(adapted).merge_and_unload())
    assert found == tokens_of(answers(engine_of(merged, prompts, 64), params))


def test_a_window_of_positions_that_ends_is_not_overrun(prompts):
    """The longest row ends at the last position that the model knows."""
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.n_positions = 12 + 8
    model = model_of(config)
    params = SamplingParams(num_return_sequences=2, max_new_tokens=8, min_new_tokens=8)
    assert all(
        len(ids) == 8
        for one in tokens_of(answers(engine_of(model, prompts, 3), params))
        for ids in one
    )


def test_plain_rows_stay_what_a_model_gets_that_cannot_be_served(prompts):
    config = LlamaConfig(**CONFIGS["llama"].to_diff_dict())
    model = plainly(model_of(config))
    assert decoder_of(model) is IncrementalModel
