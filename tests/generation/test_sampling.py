"""Draws against distributions made by hand, filters against slow definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rrhf.errors import UserError
from rrhf.generation.local.sampling import (
    draw_tokens,
    forbid_tokens,
    keep_top_k,
    keep_top_p,
    penalise_repetitions,
    pick_tokens,
    sample_uniforms,
    temperature_logprobs,
)
from rrhf.generation.params import SamplingParams, check_params

PARAMS = SamplingParams(max_new_tokens=40)


def uniforms_of(count: int, seed: int = 0) -> torch.Tensor:
    return sample_uniforms(SamplingParams(max_new_tokens=count, seed=seed), "prompt", 0)


def slow_nucleus(probs: list[float], p: float) -> set[int]:
    """Tokens from the likeliest on until their mass reaches p."""
    kept: set[int] = set()
    mass = 0.0
    for token in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass >= p:
            break
        kept.add(token)
        mass += probs[token]
    return kept


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_numbers_of_a_sample_depend_on_its_four_names_alone():
    base = sample_uniforms(PARAMS, "a", 0)
    assert torch.equal(base, sample_uniforms(PARAMS, "a", 0))
    others = [
        sample_uniforms(PARAMS, "b", 0),
        sample_uniforms(PARAMS, "a", 1),
        sample_uniforms(replace(PARAMS, seed=1), "a", 0),
        sample_uniforms(replace(PARAMS, round=1), "a", 0),
    ]
    for other in others:
        assert not torch.equal(base, other)
    # "1" and "11" with indices 11 and 1 must not run together
    assert not torch.equal(sample_uniforms(PARAMS, "1", 11), sample_uniforms(PARAMS, "11", 1))


def test_a_longer_budget_continues_the_same_numbers():
    longer = sample_uniforms(replace(PARAMS, max_new_tokens=90), "a", 0)
    assert torch.equal(longer[:40], sample_uniforms(PARAMS, "a", 0))


def test_the_numbers_are_uniform_and_below_one():
    numbers = uniforms_of(200_000).numpy()
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    counts, _ = np.histogram(numbers, bins=50, range=(0.0, 1.0))
    # 49 degrees of freedom: 99.99 % of draws lie below 94
    assert chi_square(counts, np.full(50, 4000.0)) < 94


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_draws_follow_the_distribution(temperature):
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0, -3.0, 1.0, 0.0, -torch.inf]])
    count = 100_000
    params = SamplingParams(temperature=temperature)
    tokens, _ = pick_tokens(logits.expand(count, -1), params, uniforms_of(count))
    counts = torch.bincount(tokens, minlength=8).numpy()
    assert counts[7] == 0
    expected = torch.softmax(logits[0, :7].double() / temperature, -1).numpy() * count
    # 6 degrees of freedom: 99.99 % of draws lie below 28
    assert chi_square(counts[:7], expected) < 28


def test_impossible_tokens_are_never_drawn_at_any_place():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    places = torch.tensor([0.0, 0.4999999, 0.5, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    tokens = draw_tokens(logits.softmax(-1).expand(5, -1), places)
    assert tokens.tolist() == [1, 1, 3, 3, 3]


def test_a_token_without_weight_at_the_end_is_not_drawn_by_rounding():
    logits = torch.tensor([[0.0] * 1000 + [-200.0]])
    place = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(logits.softmax(-1), place).item() == 999


def test_logprobs_are_of_the_unfiltered_distribution_at_the_temperature():
    torch.manual_seed(0)
    logits = torch.randn(64, 30) * 3
    params = SamplingParams(
        temperature=0.7, top_k=3, top_p=0.5, repetition_penalty=1.3, min_new_tokens=1
    )
    seen = torch.rand(64, 30) < 0.3
    tokens, logprobs = pick_tokens(logits, params, uniforms_of(64), seen, {4}, range(64))
    expected = torch.log_softmax(logits.double() / 0.7, -1).gather(-1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-6, rtol=1e-6)
    assert 4 not in tokens.tolist()


def test_logprobs_of_huge_logits_stay_finite():
    logits = torch.tensor([[3e4, 2e4, -3e4]])
    values = temperature_logprobs(logits.expand(3, -1), torch.arange(3), 1.0)
    torch.testing.assert_close(values, torch.tensor([0.0, -1e4, -6e4]))


def test_bfloat16_logits_are_widened_first():
    logits = torch.randn(8, 50).bfloat16()
    tokens = torch.arange(8)
    expected = torch.log_softmax(logits.double(), -1)[tokens, tokens]
    values = temperature_logprobs(logits, tokens, 1.0)
    torch.testing.assert_close(values.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("vocabulary", [7, 900])
def test_top_p_keeps_the_smallest_sufficient_set(p, vocabulary):
    torch.manual_seed(vocabulary)
    logits = torch.randn(6, vocabulary) * torch.tensor([0.01, 0.1, 1.0, 2.0, 4.0, 8.0])[:, None]
    kept = keep_top_p(logits, p).isfinite()
    probs = torch.softmax(logits, -1)
    for row in range(6):
        wanted = slow_nucleus(probs[row].tolist(), p)
        found = set(kept[row].nonzero()[:, 0].tolist())
        # float32 sums of flat distributions may miss the last token by rounding
        assert len(wanted ^ found) <= (1 if vocabulary > 7 else 0)


def test_top_p_beyond_the_guess_sorts_in_full():
    logits = torch.zeros(2, 2000)
    logits[0, 5] = 20.0
    logits[1] = torch.arange(2000) * 1e-3  # nearly flat: the nucleus needs about half of them
    kept = keep_top_p(logits, 0.6).isfinite()
    assert kept[0].nonzero()[:, 0].tolist() == [5]
    wanted = slow_nucleus(torch.softmax(logits[1], -1).tolist(), 0.6)
    assert abs(int(kept[1].sum()) - len(wanted)) <= 1
    assert not kept[1, 0] and kept[1, 1999]


def test_top_k_keeps_k_and_ties():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert keep_top_k(logits, 2).isfinite().tolist() == [[False, True, True, True, False]]
    assert keep_top_k(logits, 1).isfinite().sum() == 1
    assert torch.equal(keep_top_k(logits, 0), logits)
    assert torch.equal(keep_top_k(logits, 99), logits)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalise_repetitions(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_forbidden_tokens_leave_the_input_as_it_was():
    logits = torch.zeros(1, 3)
    assert forbid_tokens(logits, {0, 2}, [0]).tolist() == [[-math.inf, 0.0, -math.inf]]
    assert logits.tolist() == [[0.0, 0.0, 0.0]]


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits = torch.tensor([[5.0, 4.0, 0.0]])
    greedy = SamplingParams(do_sample=False, num_return_sequences=1, repetition_penalty=2.0)
    seen = torch.tensor([[True, False, False]])
    tokens, logprobs = pick_tokens(logits, greedy, None, seen=seen)
    assert tokens.item() == 1
    assert logprobs.item() == pytest.approx(torch.log_softmax(logits, -1)[0, 1].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"temperature": 0.0}, "do_sample false"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"min_new_tokens": 200}, "max_new_tokens"),
        ({"do_sample": False}, "greedy"),
        ({"num_beams": 4}, "do_sample false"),
        ({"num_beams": 2, "do_sample": False}, "raise num_beams"),
        ({"num_beams": 4, "num_beam_groups": 3, "do_sample": False}, "divisor"),
        ({"num_beams": 4, "diversity_penalty": 1.0, "do_sample": False}, "num_beam_groups"),
        ({"num_beams": 4, "top_p": 0.9, "do_sample": False}, "top_p"),
        ({"diversity_penalty": 1.0}, "diverse beam search"),
        ({"stop_strings": ("",)}, "stop_strings"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(change, word):
    with pytest.raises(UserError, match=word):
        check_params(replace(SamplingParams(), **change))


def test_the_paper_recipe_and_the_defaults_are_accepted():
    check_params(SamplingParams())
    check_params(SamplingParams(do_sample=False, num_return_sequences=1))
    check_params(
        SamplingParams(
            do_sample=False,
            num_beams=4,
            num_beam_groups=4,
            diversity_penalty=1.0,
            temperature=0.8,
        )
    )
