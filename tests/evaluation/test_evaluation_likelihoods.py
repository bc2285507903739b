"""Oracle: one forward a token in float64. Equivalence: batches, order and padding do not matter."""

import pytest
import torch
from evaluation_cases import prompt, reader, reply, slow_logprobs
from tiny import byte_level_tokenizer
from transformers import BloomConfig, BloomForCausalLM

from rrhf.data.chat_format import ChatCodec
from rrhf.evaluation import likelihoods
from rrhf.evaluation.likelihoods import read_logprobs

ROWS = [
    ([0, 5, 9], [7, 8, 1]),
    ([0, 40, 41, 42, 43, 44], [12]),
    ([3], [30, 31, 32, 33, 34, 35, 36]),
    ([0, 5, 9], []),
    ([17, 18], [1]),
]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("layout", ["auto", "dense_mask", "padded"])
def test_log_probs_are_those_of_single_forwards(temperature, layout):
    model = reader().model
    read = read_logprobs(model, ROWS, pad_id=2, temperature=temperature, layout=layout)
    for (prompt_ids, ids), values in zip(ROWS, read, strict=True):
        slow = slow_logprobs(model, prompt_ids, ids, temperature)
        # float32 sums over 400 logits, each good to about 1e-6
        assert values.tolist() == pytest.approx(slow, abs=2e-5)


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_batch_size_does_not_change_log_probs(layout, monkeypatch):
    model = reader().model
    together = read_logprobs(model, ROWS, pad_id=2, layout=layout)
    monkeypatch.setattr(likelihoods, "MAX_BATCH_TOKENS", 1)
    alone = read_logprobs(model, ROWS, pad_id=2, max_logits=1, layout=layout)
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, atol=2e-6)


def passes_of(model):
    """The ids that pass the network from now on, counted pass by pass."""
    seen = []
    model.model.register_forward_pre_hook(
        lambda _, __, arguments: seen.append(arguments["input_ids"].numel()), with_kwargs=True
    )
    return seen


def test_responses_of_a_prompt_are_read_together_and_the_model_is_tried_once():
    found = reader()
    rows = [(list(range(5, 25)), [30 + k, 7, 1]) for k in range(5)]
    found.read([rows[0], ([9], [8])], temperature=0.7)
    seen = passes_of(found.model)
    found.read(rows)
    assert seen == [20 + 5 * 2]  # nothing is predicted from a response's last token
    assert any(p.requires_grad for p in found.model.parameters())


def test_rows_beyond_a_window_that_layers_do_not_tell_go_padded():
    found, whole = reader(), reader()
    found.read(ROWS[:1])
    layout, _ = likelihoods._found[found.model]["auto"]
    likelihoods._found[found.model]["auto"] = (layout, 7)
    seen = passes_of(found.model)
    for a, b in zip(found.read(ROWS), whole.read(ROWS), strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    assert seen == [7, 5 + 6 + 2]  # the third row alone, then all others


def test_a_model_that_cannot_be_served_is_told_of_once(caplog):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2, initializer_range=0.2)
    model = BloomForCausalLM(config).eval()
    rows = [([5, 9, 7], [7, 8, 1]), ([5, 9, 7], [7, 9])]
    for _ in range(2):
        read = read_logprobs(model, rows, pad_id=3)
        for (prompt_ids, ids), values in zip(rows, read, strict=True):
            slow = slow_logprobs(model, prompt_ids, ids)
            assert values.tolist() == pytest.approx(slow, abs=2e-5)
    assert [r.levelname for r in caplog.records if r.name.startswith("rrhf")] == ["WARNING"]


def test_a_batch_holds_no_more_logits_than_allowed(monkeypatch):
    model = reader().model
    widths = []
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        widths.append(out.logits.shape[0] * out.logits.shape[1])
        return out

    monkeypatch.setattr(type(model), "forward", counted)
    rows = [([5], [7] * length) for length in (1, 2, 3, 4, 5, 6)]
    limit = 7 * model.config.vocab_size
    read_logprobs(model, rows, pad_id=2, max_logits=limit, layout="padded")
    assert max(widths) <= 7
    assert len(widths) == 5  # 6 | 5 | 4 | 3 2 | 1: a new batch is as wide as its own rows


def test_the_model_is_left_in_its_mode():
    model = reader().model
    for was_training in (True, False):
        model.train(was_training)
        read_logprobs(model, ROWS[:1], pad_id=2)
        assert model.training is was_training


def test_equal_rows_are_computed_once(monkeypatch):
    found = reader()
    seen = []
    original = read_logprobs

    def counted(model, rows, *args):
        seen.append(len(rows))
        return original(model, rows, *args)

    monkeypatch.setattr("rrhf.evaluation.likelihoods.read_logprobs", counted)
    values = found.read([*ROWS, *ROWS])
    assert seen == [len(ROWS)]
    assert all(
        torch.equal(a, b) for a, b in zip(values[: len(ROWS)], values[len(ROWS) :], strict=True)
    )


def test_what_is_known_is_not_read_again():
    found = reader()
    known = {}
    first = found.read(ROWS[:2], known=known)
    assert len(known) == 2
    known[next(iter(known))] = torch.tensor([-9.0])
    again = found.read(ROWS, known=known)
    assert again[0].tolist() == [-9.0]
    assert torch.equal(again[1], first[1])
    assert len(known) == len(ROWS)


def test_a_response_is_read_with_its_end_unless_it_was_cut():
    found = reader()
    s = prompt("say it now")
    finished = found.encode(s, reply("first line"))
    cut = found.encode(s, reply("first line", reason="length"))
    assert finished is not None and cut is not None
    assert finished[1] == [*cut[1], found.codec.end_id]


def test_what_does_not_fit_into_the_window_is_told():
    found = reader(window=24)
    assert found.encode(prompt("dog"), reply("0 1 2 3 4 5 6 7 8 9 " * 3)) is None
    assert found.encode(prompt("how do I " * 20), reply("dog")) is None
    row = found.encode(prompt("dog"), reply("fox"))
    assert row is not None and found.fits(row)
    assert not found.fits(([0] * 20, [0] * 5))


def test_vocabularies_are_compared_by_their_words():
    found = reader()
    assert found.has_vocabulary_of(ChatCodec(byte_level_tokenizer()))
    assert not found.has_vocabulary_of(ChatCodec(byte_level_tokenizer(vocab_size=300)))
