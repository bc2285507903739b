"""Oracle: every sequence that two tiny models can write, enumerated in float64."""

import itertools
import math

import pytest
import torch
from evaluation_cases import slow_logprobs
from transformers import LlamaConfig, LlamaForCausalLM

from rrhf.evaluation.likelihoods import read_logprobs
from rrhf.evaluation.metrics.kl import (
    best_of_n_bound,
    divergence_measures,
    expectation_note,
    sequence_k3,
    sequence_log_ratio,
)
from rrhf.evaluation.weight_distance import stored_weight_distance, weight_distance
from rrhf.generation.engine import SamplingParams

EOS = 1
WORDS = 5
LONGEST = 3
PROMPT = [0, 3]


def five_word_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.6,
    )
    return LlamaForCausalLM(config).eval()


def all_sequences():
    """Every response: ended by EOS, or cut at the longest length."""
    for length in range(1, LONGEST + 1):
        for ids in itertools.product(range(WORDS), repeat=length):
            inner_end = EOS in ids[:-1]
            if not inner_end and (ids[-1] == EOS or length == LONGEST):
                yield list(ids)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_expectation_of_both_estimates_is_the_divergence(temperature):
    policy, reference = five_word_model(0), five_word_model(1)
    sequences = list(all_sequences())
    ours = [slow_logprobs(policy, PROMPT, ids, temperature) for ids in sequences]
    theirs = [slow_logprobs(reference, PROMPT, ids, temperature) for ids in sequences]
    chances = [math.exp(sum(values)) for values in ours]
    assert sum(chances) == pytest.approx(1.0)
    exact = sum(p * (sum(a) - sum(b)) for p, a, b in zip(chances, ours, theirs, strict=True))
    assert exact > 0.1

    rows = [(PROMPT, ids) for ids in sequences]
    read = read_logprobs(policy, rows, 0, temperature)
    reference_read = read_logprobs(reference, rows, 0, temperature)
    k1 = [sequence_log_ratio(a, b) for a, b in zip(read, reference_read, strict=True)]
    k3 = [sequence_k3(a, b) for a, b in zip(read, reference_read, strict=True)]
    assert sum(p * v for p, v in zip(chances, k1, strict=True)) == pytest.approx(exact, abs=1e-5)
    assert sum(p * v for p, v in zip(chances, k3, strict=True)) == pytest.approx(exact, abs=1e-5)
    assert min(k3) >= 0 > min(k1)


def test_a_prompts_responses_are_averaged_first():
    ours = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    theirs = [torch.tensor([-2.0, -2.0]), torch.tensor([-1.5])]
    other = [torch.tensor([-1.0])]
    measures = divergence_measures(
        ["a", "b", "c"], [ours, other, []], [theirs, [torch.tensor([-4.0])], []]
    )
    # a: log-ratios 1 and 1; b: 3; c has no response
    assert measures["kl"].values == {"a": pytest.approx(1.0), "b": pytest.approx(3.0)}
    # k3 = exp(-d) - 1 + d: exp(-1) for d = 1, and 0 where the models agree
    k3 = {"a": pytest.approx(math.exp(-1)), "b": pytest.approx(math.exp(-3) + 2)}
    assert measures["kl_k3"].values == k3


def test_an_empty_response_diverges_by_nothing():
    nothing = torch.zeros(0)
    assert sequence_log_ratio(nothing, nothing) == 0.0
    assert sequence_k3(nothing, nothing) == 0.0


def test_the_bound_of_best_of_n_holds_and_is_nearly_reached():
    assert best_of_n_bound(1) == 0.0
    assert best_of_n_bound(4) == pytest.approx(0.636, abs=1e-3)
    assert best_of_n_bound(8) == pytest.approx(1.204, abs=1e-3)
    # 200 equally likely answers, each with another score: the exact divergence by enumeration.
    n, answers = 4, 200
    chances = [((k + 1) ** n - k**n) / answers**n for k in range(answers)]
    exact = sum(p * math.log(p * answers) for p in chances if p > 0)
    assert exact <= best_of_n_bound(n)
    assert exact == pytest.approx(best_of_n_bound(n), abs=0.02)


@pytest.mark.parametrize(
    ("params", "word"),
    [
        (SamplingParams(), None),
        (SamplingParams(temperature=0.7), None),
        (SamplingParams(do_sample=False, num_return_sequences=1), "greedy"),
        (SamplingParams(top_p=0.9), "top_p"),
        (SamplingParams(top_k=5), "top_k"),
        (SamplingParams(repetition_penalty=1.2), "repetition_penalty"),
    ],
)
def test_a_note_says_where_kl_is_no_expectation(params, word):
    note = expectation_note(params)
    assert note is None if word is None else word in note


def test_weight_distance_is_the_relative_norm_of_what_moved():
    one, other = five_word_model(0), five_word_model(0)
    assert weight_distance(one, other) == 0.0
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in one.parameters()))
    with torch.no_grad():
        one.model.norm.weight[0] += 3.0
        one.lm_head.weight[2, 1] -= 4.0
    assert weight_distance(one, other) == pytest.approx(5.0 / norm, rel=1e-5)


@pytest.mark.parametrize("shard", ["1GB", "1KB"])
def test_stored_weights_are_as_far_apart_as_the_models(tmp_path, shard):
    one, other = five_word_model(0), five_word_model(0)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter += 1e-5
    for name, model in (("one", one), ("other", other)):
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
    found = stored_weight_distance(tmp_path / "one", tmp_path / "other")
    assert found == pytest.approx(weight_distance(one, other), rel=1e-6)
    assert weight_distance(one.bfloat16(), other.bfloat16()) != pytest.approx(found, rel=0.5)
    assert stored_weight_distance(tmp_path / "one", "some/hub-name") is None


def test_other_weights_have_no_distance():
    from tiny import tiny_llama

    assert weight_distance(five_word_model(0), tiny_llama()) is None
