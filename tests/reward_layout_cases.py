"""Reward models of several families and ragged batches for the tests of layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reward_cases import EOS, PAD, classifier
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from rrhf.data.collate import EncodedSet, TokenBatch, collate


def grouped(family: str, **more: Any) -> Any:
    """Families whose configs want more than `reward_cases.FAMILIES` say."""
    config = AutoConfig.for_model(family)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    ids = {"num_labels": 1, "pad_token_id": PAD, "eos_token_id": EOS, "initializer_range": 0.2}
    kernel = "eager" if more.get("attn_logit_softcapping") else "sdpa"
    model = AutoModelForSequenceClassification.from_config(
        type(config)(**shape, **ids, **more), attn_implementation=kernel
    )
    nn.init.normal_(model.score.weight)
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: classifier("llama", num_key_value_heads=2),
    "qwen3": lambda: grouped("qwen3"),
    "gpt2": lambda: classifier("gpt2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt_neox": lambda: classifier("gpt_neox"),
    "gemma": lambda: classifier("gemma"),
    "gemma2": lambda: grouped("gemma2", attn_logit_softcapping=2.0, sliding_window=64),
    "mistral_window": lambda: grouped("mistral", sliding_window=7),
}


def batch(shapes: list[tuple[int, list[int]]]) -> TokenBatch:
    """Prompts and responses of these lengths, their ends included, and what orders them."""
    generator = torch.Generator().manual_seed(len(shapes))

    def ids(length: int) -> list[int]:
        return torch.randint(5, 50, (length,), generator=generator).tolist()

    return collate(
        [
            EncodedSet(
                ids(prompt),
                [[*ids(length - 1), EOS] for length in lengths],
                torch.randn(len(lengths), generator=generator).tolist(),
            )
            for prompt, lengths in shapes
        ],
        PAD,
    )


RAGGED = batch([(9, [4, 1, 7, 12]), (3, [5, 5]), (6, [8]), (1, [1, 1, 2]), (9, [1, 1])])
