"""A small model with a tokenizer, a reward model and data for every paradigm, of random words."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rrhf.worlds.tiny_model import build_tokenizer

WORDS = (
    *("plants", "water", "light", "soil", "friend", "morning", "train", "ticket", "paper"),
    *("letter", "answer", "question", "bread", "kitchen", "river", "garden", "window"),
    *("music", "silver", "winter", "please", "never", "always", "often", "help", "carefully"),
)
COMPLETE = "complete"


def build(folder: Path, hidden: int, layers: int, prompts: int = 32, seed: int = 0) -> Path:
    """model/, reward/, ranked.jsonl, pairs.jsonl and prompts.jsonl; returns the folder.

    Args:
        folder: kept as it is where it is already complete.
        hidden, layers: of both models; a head is 64 wide, or the whole of a narrower model.
        prompts: of each file.
        seed: of words and weights.
    """
    if (folder / COMPLETE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(source.choices(WORDS, k=source.randint(low, high)))

    queries = [f"\n\nHuman: {words(3, 40)} {n}\n\nAssistant:" for n in range(prompts)]
    ranked = []
    for query in queries:
        responses = [f" {words(1, 30)}" for _ in range(4)]
        scores = [source.gauss(0, 1) for _ in responses]
        ranked.append({"query": query, "responses": responses, "scores": scores})
    pairs = [
        {"chosen": f"{query} {words(1, 30)}", "rejected": f"{query} {words(1, 30)}"}
        for query in queries
    ]
    _write(folder / "ranked.jsonl", ranked)
    _write(folder / "pairs.jsonl", pairs)
    _write(folder / "prompts.jsonl", [{"query": query, "responses": []} for query in queries])
    texts = [" ".join((row["query"], *row["responses"])) for row in ranked]
    tokenizer = build_tokenizer(texts, 512, folder / "model")
    tokenizer.save_pretrained(folder / "reward")
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=5 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads > 1 else 1,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        config.num_labels = 1
        LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    (folder / COMPLETE).touch()
    return folder


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
