"""Rows over shared prompts against plain forwards of each row alone."""

from __future__ import annotations

import logging

import pytest
import torch
from decoder_cases import BLOOM, CONFIGS, model_of, random_ids

from rrhf.generation.local import decoders
from rrhf.generation.local.decoders import decoding
from rrhf.generation.local.incremental import IncrementalModel
from rrhf.generation.local.shared_prompt import NAME, SharedPromptModel, in_place


class Beside:
    """Rows as they should stand, beside the decoder's."""

    def __init__(self, model, decoder) -> None:
        self.model, self.decoder = model, decoder
        self.rows: list[list[int]] = []
        self.handles: list[int] = []

    def read(self, lengths):
        prompts = [random_ids(length) for length in lengths]
        handles, logits = self.decoder.read(prompts)
        self.check(logits, prompts)
        return list(zip(handles, prompts, strict=True))

    def arrange(self, sources, new=()):
        self.rows = [self.rows[place] for place in sources] + [list(ids) for _, ids in new]
        self.handles = [self.handles[place] for place in sources] + [handle for handle, _ in new]
        order = sorted(range(len(self.rows)), key=lambda place: self.handles[place])
        origin = [*sources, *[None] * len(new)]
        self.rows = [list(self.rows[place]) for place in order]
        self.handles = [self.handles[place] for place in order]
        self.decoder.arrange([origin[place] for place in order], self.handles)

    def steps(self, count):
        for _ in range(count):
            tokens = torch.randint(1, 64, (len(self.rows),))
            for row, token in zip(self.rows, tokens.tolist(), strict=True):
                row.append(token)
            logits = self.decoder.step(tokens)
        self.check(logits, self.rows)

    def check(self, logits, rows):
        plain = torch.stack([self.model(torch.tensor([row])).logits[0, -1] for row in rows])
        torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_rows_read_on_as_in_a_plain_forward_whoever_comes_and_goes(kind):
    model, plain = model_of(CONFIGS[kind]), model_of(CONFIGS[kind])
    with in_place(model):
        beside = Beside(plain, SharedPromptModel(model))
        first = beside.read([5, 20, 11])
        beside.arrange([], [one for one in first for _ in range(2)])
        beside.steps(5)
        beside.arrange([0, 2, 3, 5])  # a ragged batch
        beside.steps(3)
        beside.arrange([0, 0, 2])  # a row that goes on twice, as beams do
        beside.steps(1)
        beside.decoder.release([first[2][0]])
        later = beside.read([7, 7])  # one takes the place that was left, one makes its own
        beside.arrange([0, 1, 2], [later[0], later[1], later[1], first[0]])
        assert len(beside.decoder._lengths) == 4
        beside.steps(70)  # beyond the room that was allocated at first
        beside.decoder.release([handle for handle, _ in first[:2]])
        beside.arrange([4, 5, 6])  # the first prompts are dropped
        beside.steps(2)
        (last,) = beside.read([30])
        beside.arrange([1], [last])
        beside.steps(2)


@torch.no_grad()
def test_a_decoder_can_be_emptied_and_filled_again():
    model, plain = model_of(CONFIGS["llama"]), model_of(CONFIGS["llama"])
    with in_place(model):
        beside = Beside(plain, SharedPromptModel(model))
        for lengths in ([4, 9, 3], [6]):
            held = beside.read(lengths)
            beside.arrange([], held)
            beside.steps(3)
            beside.decoder.release([handle for handle, _ in held])
            beside.rows, beside.handles = [], []


@torch.no_grad()
def test_prompts_are_kept_once_whatever_the_number_of_rows():
    model = model_of(CONFIGS["llama"])
    with in_place(model):
        decoder = SharedPromptModel(model)
        handles, _ = decoder.read([random_ids(12)])
        decoder.arrange([None] * 5, handles * 5)
        decoder.step(torch.ones(5, dtype=torch.int64))
        past = decoder._past[0]
        assert past.prompt_keys.shape == (2, 1, 12, 8), "key heads are not repeated either"
        before, own = past.prompt_keys.data_ptr(), past.own_keys.data_ptr()
        decoder.step(torch.ones(5, dtype=torch.int64))
        assert past.own_keys.data_ptr() == own, "a token is written, the rest stays put"
        decoder.arrange([0, 3], handles * 2)
        decoder.step(torch.ones(2, dtype=torch.int64))
        assert past.prompt_keys.data_ptr() == before and past.own_keys.shape[1] == 2


@pytest.mark.parametrize("base", ["sdpa", "eager", "rrhf_shared_prefix"])
def test_the_models_own_attention_comes_back_whatever_happens(base):
    model = model_of(CONFIGS["llama"])
    model.set_attn_implementation(base)
    with pytest.raises(KeyError), in_place(model):
        assert model.config._attn_implementation == NAME
        raise KeyError
    assert model.config._attn_implementation == base


# ---- which models are served -------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_family_passes_its_trial(kind, caplog):
    with caplog.at_level(logging.WARNING), decoding(model_of(CONFIGS[kind]), 0, 100) as new:
        assert isinstance(new(), SharedPromptModel)
    assert not caplog.records


def test_a_model_that_cannot_be_served_goes_plain_and_says_so_once(caplog):
    model = model_of(BLOOM)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with decoding(model, 0, 100) as new:
                assert isinstance(new(), IncrementalModel)
    (record,) = [record for record in caplog.records if record.name.startswith("rrhf")]
    assert "BloomForCausalLM" in record.getMessage()
    assert model.config._attn_implementation == model_of(BLOOM).config._attn_implementation


def test_logits_that_differ_are_told(monkeypatch):
    true_step = SharedPromptModel.step
    monkeypatch.setattr(SharedPromptModel, "step", lambda *args: true_step(*args) * 1.01)
    verdict = decoders._tried(model_of(CONFIGS["llama"]), 0)
    assert verdict.misfit is not None and "logits differ by 0.01" in verdict.misfit


def test_a_window_that_layers_keep_to_themselves_sends_longer_rows_the_plain_way(monkeypatch):
    model = model_of(CONFIGS["llama"])
    model.config.sliding_window = 40  # the layers of a Llama know nothing of it
    with decoding(model, 0, 40) as new:
        assert isinstance(new(), SharedPromptModel)
    with decoding(model, 0, 41) as new:
        assert isinstance(new(), IncrementalModel)


def test_half_precision_does_not_hide_a_difference(monkeypatch):
    """Rounding in bfloat16 makes a difference of its own, which is larger than this one."""
    true_step = SharedPromptModel.step
    monkeypatch.setattr(SharedPromptModel, "step", lambda *args: true_step(*args) * 1.01)
    verdict = decoders._tried(model_of(CONFIGS["llama"]).bfloat16(), 0)
    assert verdict.misfit is not None and "logits differ by 0.01" in verdict.misfit


def test_a_gross_difference_in_half_precision_alone_is_found(monkeypatch):
    model = model_of(CONFIGS["llama"]).bfloat16()
    true_step = SharedPromptModel.step

    def step(*args):
        logits = true_step(*args)
        return logits if logits.dtype == torch.float32 else -logits

    monkeypatch.setattr(SharedPromptModel, "step", step)
    verdict = decoders._tried(model, 0)
    assert verdict.misfit is not None and "logits differ by 2" in verdict.misfit
