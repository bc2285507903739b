"""Tiny reward models as folders, and batches and candidate sets to score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import byte_level_tokenizer, tiny_llama
from transformers import AutoConfig, AutoModelForSequenceClassification

from rrhf.data.collate import EncodedSet
from rrhf.models.reward_model import CHAT_FORMAT_KEY, init_reward_model, set_score_normalizer
from rrhf.models.saving import write_model_folder
from rrhf.records import Candidate, CandidateSet, Message, set_id

PAD, EOS = 2, 1


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "phi": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
}


def classifier(family: str = "llama", **changes: Any) -> Any:
    """A tiny reward model of random weights, the same each time."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    config = AutoConfig.for_model(family)
    values = {
        **shape,
        **FAMILIES[family],
        "vocab_size": 50,
        "num_labels": 1,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": 0,
        "initializer_range": 0.2,
        **changes,
    }
    config = type(config)(**values)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def language_model_folder(folder: Path, pad: str | None = "<pad>", chat: bool = False) -> Path:
    """A tiny LLaMA with its tokenizer; `pad` may be "</s>" (the EOS) or None."""
    tokenizer = byte_level_tokenizer(pad=pad, chat=chat)
    model = tiny_llama(len(tokenizer), window=256)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reward_model_folder(
    folder: Path,
    pad: str | None = "<pad>",
    chat: bool = False,
    seed: int = 0,
    chat_format: str = "auto",
    normalizer: Any = None,
) -> Path:
    """A reward model with a random head, saved as training saves it."""
    base = language_model_folder(folder.with_name(f"{folder.name}-base"), pad, chat)
    tokenizer = byte_level_tokenizer(pad=pad, chat=chat)
    end_is_pad = tokenizer.pad_token_id in (None, tokenizer.eos_token_id)
    model = init_reward_model(base, seed, None if end_is_pad else tokenizer.pad_token_id)
    setattr(model.config, CHAT_FORMAT_KEY, chat_format)
    set_score_normalizer(model.config, normalizer)
    folder.mkdir()
    write_model_folder(folder, model, tokenizer)
    return folder


def encoded_sets(vocab_size: int, count: int = 5, end_id: int | None = None) -> list[EncodedSet]:
    """Ragged prompts and responses of random ids that begin at 5; `end_id` closes responses."""
    shuffle = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(5, vocab_size, (length,), generator=shuffle).tolist()

    end = [] if end_id is None else [end_id]
    return [
        EncodedSet(ids(i % 4 + 1), [ids((i + j) % 5 + 1) + end for j in range(i % 3 + 1)])
        for i in range(count)
    ]


def conversation(asked: str, *responses: str, **fields: Any) -> CandidateSet:
    messages = (Message("user", asked),)
    candidates = tuple(Candidate(text, **fields) for text in responses)
    query = f"\n\nHuman: {asked}\n\nAssistant:"
    return CandidateSet(set_id(query, messages), query, messages, candidates)
