"""Model families, ragged batches and a training step that the tests of layouts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import tiny_llama
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.models.forward.logprobs import Policy, PolicyOutputs
from rrhf.models.forward.shared_prefix import lay_out
from rrhf.training.methods.objectives.rrhf import RRHF, RRHFSettings
from rrhf.training.methods.rank import RankObjective

V = 80


SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}


def gemma2(**more: Any) -> PreTrainedModel:
    """Soft-capped attention and logits: such models run with eager attention alone."""
    config = Gemma2Config(
        **GROUPED, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **more
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager")


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_llama(V),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "gemma2": lambda: gemma2(sliding_window=64),
    "gemma2_window": lambda: gemma2(sliding_window=7),
    "gemma3_window": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **GROUPED,
            sliding_window=7,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=7)),
}


def model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batch(shapes: list[tuple[int, list[int]]]) -> TokenBatch:
    """Prompts and responses of these lengths, and scores that violate about half of the pairs."""
    generator = torch.Generator().manual_seed(len(shapes))

    def ids(length: int) -> list[int]:
        return torch.randint(3, V, (length,), generator=generator).tolist()

    sets = [
        EncodedSet(
            ids(prompt),
            [ids(length) for length in lengths],
            torch.randn(len(lengths), generator=generator).tolist(),
        )
        for prompt, lengths in shapes
    ]
    return collate(sets, pad_id=2)


RAGGED = batch([(9, [4, 1, 7, 12]), (3, [5, 5]), (6, [8]), (1, [1, 1, 2]), (9, [1, 1])])


SHAPES = {
    "one_prompt": batch([(8, [6, 6, 6, 6])]),
    "ragged": RAGGED,
    "alone": batch([(5, [4]), (7, [9]), (7, [1])]),
}


def step(policy: Policy, b: TokenBatch) -> tuple[float, Tensor, Tensor]:
    """RRHF's loss, its log-probs and the whole gradient."""
    outputs: PolicyOutputs = policy(b)
    terms = RankObjective(RRHF.build(RRHFSettings()))(outputs, b)
    loss = torch.stack([term.total * term.weight for term in terms.values()]).sum() / b.num_prompts
    policy.zero_grad()
    loss.backward()
    gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    return float(loss.detach()), outputs.logprobs.detach(), torch.cat(gradients).double()


def require_equal(
    found: tuple[float, Tensor, Tensor], expected: tuple[float, Tensor, Tensor]
) -> None:
    assert abs(found[0] - expected[0]) <= 1e-5 * max(1.0, abs(expected[0]))
    assert torch.allclose(found[1], expected[1], atol=2e-5)
    assert float((found[2] - expected[2]).norm() / expected[2].norm()) < 1e-5


def at_the_edge(window: int, beyond: int) -> TokenBatch:
    """Rows of one prompt, and one by itself, whose last fed token stands so far beyond a window.

    A response's last token is fed to nobody.
    """
    b = batch([(4, [window + beyond - 3] * 2), (5, [window + beyond - 4]), (2, [2, 1])])
    assert lay_out(b).longest == window + beyond
    return b
