"""Model families that the tests of decoders share."""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.25,
}


_GROUPED = {**_SIZES, "num_key_value_heads": 2}


_WIDE = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}


_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


CONFIGS = {
    "llama": LlamaConfig(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
    "gpt_neox": GPTNeoXConfig(**_SIZES),
    "mistral, short window": MistralConfig(**_GROUPED, sliding_window=6),
    "gemma2, soft caps": Gemma2Config(
        **_WIDE,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
    ),
    "gemma3, two kinds of layers": Gemma3TextConfig(**_WIDE, sliding_window=6, layer_types=_KINDS),
}


BLOOM = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def random_ids(length: int) -> list[int]:
    return torch.randint(1, 64, (length,)).tolist()
