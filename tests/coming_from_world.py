"""Tiny models and data for the words in capitals of docs/coming_from.md."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from reward_cases import reward_model_folder
from tiny import byte_level_tokenizer, save_tiny, tiny_llama
from transformers import GPTJConfig, GPTJModel

PLACEHOLDERS = ["MODEL", "REWARD_MODEL", "TRLX_REWARD_MODEL", "PPL_MODEL", "PAIRS", "MORE_PAIRS"]
PLACEHOLDERS += ["HELD_OUT_PAIRS", "DEMONSTRATIONS", "PROMPTS", "RANKED", "OUT"]
# Longest first, and whole words only: PAIRS is a part of MORE_PAIRS.
PLACEHOLDER = re.compile(rf"\b({'|'.join(sorted(PLACEHOLDERS, key=len, reverse=True))})\b")


def filled(text: str, things: dict[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: things[found.group(1)], text)


def build_things(place: Path) -> dict[str, str]:
    """Make them in a new folder, each kind of data in another form; returns word -> path."""
    place.mkdir()
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer), window=1024).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    save_tiny(place / "ppl_model", seed=1)
    reward_model_folder(place / "reward_model", seed=2)
    _trlx_reward_model(place / "trlx")
    transcripts = [_transcripts(number) for number in range(40)]
    with gzip.open(place / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in transcripts)
    texts = {
        "more_pairs.jsonl": _lines(_numbered_pair(number) for number in range(4)),
        "held_out.jsonl": _lines(_transcripts(number) for number in range(100, 104)),
        "demonstrations.jsonl": _lines(_demonstration(number) for number in range(4)),
        "prompts.json": json.dumps([{"instruction": f"Count to {n}."} for n in range(4)]),
        "ranked.json": json.dumps([_ranked(number) for number in range(4)]),
    }
    for name, text in texts.items():
        (place / name).write_text(text)
    return {
        "MODEL": str(place / "model"),
        "REWARD_MODEL": str(place / "reward_model"),
        "TRLX_REWARD_MODEL": str(place / "trlx"),
        "PPL_MODEL": str(place / "ppl_model"),
        "PAIRS": str(place / "pairs.jsonl.gz"),
        "MORE_PAIRS": str(place / "more_pairs.jsonl"),
        "HELD_OUT_PAIRS": str(place / "held_out.jsonl"),
        "DEMONSTRATIONS": str(place / "demonstrations.jsonl"),
        "PROMPTS": str(place / "prompts.json"),
        "RANKED": str(place / "ranked.json"),
    }


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _transcripts(number: int) -> dict[str, str]:
    start = f"\n\nHuman: What is {number} and a half?\n\nAssistant:"
    return {"chosen": f"{start} A number.", "rejected": f"{start} No idea, sorry."}


def _numbered_pair(number: int) -> dict[str, Any]:
    row = {"prompt": f"Is {number} even?", "response_0": "Who knows.", "response_1": "Divide it."}
    return row | {"better_response_id": 1, "safer_response_id": 0, "is_response_0_safe": True}


def _demonstration(number: int) -> dict[str, str]:
    return {"instruction": "Add one.", "input": str(number), "output": str(number + 1)}


def _ranked(number: int) -> dict[str, Any]:
    responses = ["Red.", "Blue, I think.", "No."]
    row = {"query": f"Name a colour.\nNot {number}.", "responses": responses, "scores": [3, 4.5, 1]}
    return row | {"origin_scores": ["3", "four", None]}


def _trlx_reward_model(folder: Path) -> None:
    """GPT-J's trunk and a value head in one file of weights, as trlX's examples publish them."""
    tokenizer = byte_level_tokenizer(pad=None, bos=False)
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=1,
    )
    weights = {f"transformer.{name}": w for name, w in GPTJModel(config).state_dict().items()}
    folder.mkdir()
    torch.save(weights | {"v_head.weight": torch.randn(1, 32)}, folder / "hf_ckpt.pt")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
