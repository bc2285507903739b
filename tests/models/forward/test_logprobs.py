"""The forward interface gives the log-probs that a plain forward of each row alone gives."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_llama
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.models.forward.logprobs import LogprobOptions, Policy
from rrhf.models.loading import enable_checkpointing

SETS = [
    EncodedSet([5, 6, 7, 8], [[8, 9, 1], [10, 1]]),
    EncodedSet([5], [[11, 12, 13, 14, 1]]),
    EncodedSet([20, 21], [[1]]),
]


def models() -> list[PreTrainedModel]:
    torch.manual_seed(0)
    small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return [
        tiny_llama(60),
        GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)).eval(),
        GPTNeoXForCausalLM(GPTNeoXConfig(**small, intermediate_size=64)).eval(),
        Qwen3ForCausalLM(
            Qwen3Config(**small, intermediate_size=64, num_key_value_heads=2, head_dim=8)
        ).eval(),
    ]


def alone(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The slow truth: one unpadded row, a full softmax, token by token."""
    ids = torch.tensor([[*prompt, *response]])
    logs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return torch.stack([logs[len(prompt) - 1 + t, token] for t, token in enumerate(response)])


@pytest.mark.parametrize("model", models(), ids=lambda m: type(m).__name__)
def test_every_row_as_if_it_were_alone(model: PreTrainedModel) -> None:
    batch = collate(SETS, pad_id=9)
    with torch.no_grad():
        logprobs = Policy(model)(batch).logprobs
        rows = [(s.prompt_ids, ids) for s in SETS for ids in s.response_ids]
        for row, length, (prompt, response) in zip(
            logprobs, batch.response_lengths, rows, strict=True
        ):
            truth = alone(model, list(prompt), list(response))
            assert torch.allclose(row[:length].double(), truth, atol=2e-5)
            assert (row[length:] == 0).all()


def test_pad_id_and_batch_mates_change_nothing() -> None:
    policy = Policy(tiny_llama(60))
    with torch.no_grad():
        one = policy(collate(SETS[:1], pad_id=0)).logprobs
        other = policy(collate(SETS, pad_id=33)).logprobs[:2, :3]
    assert torch.allclose(one, other, atol=1e-5)


def test_temperature_divides_the_logits() -> None:
    model, batch = tiny_llama(60), collate(SETS, 0)
    with torch.no_grad():
        warm = Policy(model, LogprobOptions(1e6))(batch).logprobs
        plain = Policy(model)(batch).logprobs
    assert torch.allclose(warm[0], torch.tensor([-math.log(60)] * 3 + [0.0] * 2), atol=1e-3)
    assert not torch.allclose(plain[0, :3], warm[0, :3], atol=1e-2)


def test_entropy_and_mean_logprobs_against_a_loop() -> None:
    model, batch = tiny_llama(60), collate(SETS, 0)
    with torch.no_grad():
        outputs = Policy(model, LogprobOptions(with_entropy=True, with_mean_logprobs=True))(batch)
        logs = model(torch.tensor([[5, 6, 7, 8, 8]])).logits[0].double().log_softmax(-1)
    entropy = -sum(math.exp(value) * value for value in logs[3].tolist())
    mean = sum(logs[3].tolist()) / 60
    assert outputs.entropy is not None and outputs.mean_logprobs is not None
    assert abs(float(outputs.entropy[0, 0]) - entropy) < 1e-5
    assert abs(float(outputs.mean_logprobs[0, 0]) - mean) < 1e-5
    assert float(outputs.entropy[2, 4]) != 0 and float(outputs.entropy[3, 4]) == 0


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    def gradient(checkpointing: bool) -> torch.Tensor:
        model = tiny_llama(60).train()
        if checkpointing:
            enable_checkpointing(model)
        batch: TokenBatch = collate(SETS, 0)
        Policy(model)(batch).logprobs.sum().backward()
        found = model.model.layers[0].self_attn.q_proj.weight.grad
        assert found is not None
        return found

    assert torch.allclose(gradient(False), gradient(True), atol=1e-6)
