"""A tiny world and settings for RRHF in rounds; one rank of two, as a script."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from ppo_cases import save_reward_model
from tiny import save_tiny
from trainer_cases import WORDS, write_lines

from rrhf.errors import AlreadyFinished
from rrhf.process_end import run_process
from rrhf.training.rounds import iterative
from rrhf.training.rounds.iterative_config import IterativeConfig


def build_world(folder: Path) -> Path:
    """model/, reward/, pairs.jsonl and heldout.jsonl; returns the folder."""
    save_tiny(folder / "model")
    save_reward_model(folder / "reward")
    write_lines(folder / "pairs.jsonl", [_pair(number) for number in range(6)])
    write_lines(folder / "heldout.jsonl", [_pair(number) for number in range(10, 13)])
    return folder


def _pair(number: int) -> dict[str, Any]:
    start = f"\n\nHuman: how to {WORDS[number % len(WORDS)]} {number}\n\nAssistant:"
    return {
        "chosen": f"{start} {WORDS[(number + 3) % len(WORDS)]} now",
        "rejected": f"{start} quick",
    }


def values(world: Path, output_dir: Path | str, **changes: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(world / "model"),
        "reward_model_name_or_path": str(world / "reward"),
        "train_datasets": str(world / "pairs.jsonl"),
        "output_dir": str(output_dir),
        "num_return_sequences": 3,
        "max_new_tokens": 6,
        "model_max_length": 100,
        "per_device_prompt_batch_size": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 0,
        **changes,
    }


def settings(world: Path, output_dir: Path | str, **changes: Any) -> IterativeConfig:
    return IterativeConfig(**values(world, output_dir, **changes))


def train_again(world: str, output_dir: str, **changes: Any) -> None:
    """A run, or its continuation where it was begun: what a restart script does."""
    begun = (Path(output_dir) / "settings.json").exists()
    with suppress(AlreadyFinished):  # killed after its last word
        iterative.train(settings(Path(world), output_dir, resume_from_checkpoint=begun, **changes))


def long_is_good(prompts: Sequence[str], responses: Sequence[str], messages: Any) -> list[float]:
    return [float(len(response)) for response in responses]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_rank() -> None:
    """As a program: the world, the run folder, the changes as JSON."""
    torch.set_num_threads(1)
    iterative.train(settings(Path(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3])))


if __name__ == "__main__":
    run_process(one_rank)
