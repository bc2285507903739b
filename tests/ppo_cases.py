"""Scorers, prompts and settings for runs of PPO on a tiny model; one rank of two, as a script."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tiny import byte_level_tokenizer, save_tiny, tiny_llama
from trainer_cases import ranked_rows, write_lines
from transformers import LlamaForSequenceClassification

from rrhf.algorithms.normalizers import RunningMeanStd
from rrhf.cli.main import main
from rrhf.data.chat_format import ChatCodec
from rrhf.errors import AlreadyFinished, StoppedBySignal
from rrhf.models.reward_model import set_score_normalizer
from rrhf.process_end import run_process
from rrhf.runs import RunFolder
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.setup import Workbench
from rrhf.training.online import ppo


def has_e(prompts: Sequence[str], responses: Sequence[str], messages: Any) -> list[float]:
    """A bandit: a response with the letter e is worth 1."""
    return [float("e" in response) for response in responses]


def nothing(prompts: Sequence[str], responses: Sequence[str], messages: Any) -> list[float]:
    return [0.0 for _ in responses]


def some_none(prompts: Sequence[str], responses: Sequence[str], messages: Any) -> list[Any]:
    return [None if place % 4 == 1 else 1.0 for place, _ in enumerate(responses)]


def save_reward_model(folder: Path, vocab_size: int = 400) -> Path:
    """A reward model on the tiny trunk, with a normaliser and a head that is far from zero."""
    tokenizer = byte_level_tokenizer(vocab_size)
    config = tiny_llama(len(tokenizer)).config
    config.num_labels = 1
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config)
    normalizer = RunningMeanStd()
    normalizer.update(torch.tensor([-1.0, 2.0, 3.0]))
    set_score_normalizer(model.config, normalizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_prompts(path: Path, count: int = 6) -> Path:
    return write_lines(
        path, [{"query": row["query"], "responses": []} for row in ranked_rows(count)]
    )


def save_runs(folder: Path, runs: Mapping[str, str], training: Sequence[object]) -> Path:
    """model/, data.jsonl, prompts.jsonl, and a run for each name: of the stage that is given."""
    save_tiny(folder / "model")
    data = write_lines(folder / "data.jsonl", ranked_rows(6))
    save_prompts(folder / "prompts.jsonl", 3)
    for run, stage in runs.items():
        words = ["train", stage, "--model_name_or_path", folder / "model", "--data_path", data]
        words += ["--output_dir", folder / run, *training]
        assert main([str(word) for word in words]) == 0
    return folder


def save_demonstrations(folder: Path) -> Path:
    return write_lines(folder / "demonstrations.jsonl", ranked_rows(7))


def build_world(folder: Path) -> Path:
    """model/, reward/ and prompts.jsonl; returns the folder."""
    save_tiny(folder / "model")
    save_reward_model(folder / "reward")
    save_prompts(folder / "prompts.jsonl")
    return folder


def settings(world: Path, output_dir: Path | str, **changes: Any) -> ppo.PPOConfig:
    values: dict[str, Any] = {
        "train_datasets": str(world / "prompts.jsonl"),
        "reward_model_name_or_path": str(world / "reward"),
        "rollout_size": 12,
        "num_rollouts": 2,
        "ppo_epochs": 2,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "per_device_prompt_batch_size": 4,
        "max_new_tokens": 6,
        "learning_rate": 3e-3,
        "critic_learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "model_max_length": 100,
        "chat_format": "raw",
        "save_steps": 0,
        **changes,
    }
    return ppo.PPOConfig(str(world / "model"), str(output_dir), **values)


def workbench(config: ppo.PPOConfig, codec: ChatCodec) -> Workbench:
    """Where nothing is opened."""
    run = RunFolder(config.output_dir)
    return Workbench(config, run, Parallel(), codec.tokenizer, codec, started=0.0)


def without_clock(row: dict[str, float]) -> dict[str, float]:
    """A row of metrics without what a clock or the memory says."""
    kinds = ("seconds_", "tokens_per_second", "peak_mib_")
    return {name: value for name, value in row.items() if not name.startswith(kinds)}


def train_again(world: str, output_dir: str, **changes: Any) -> None:
    """A run, or its continuation where it was begun: what a restart script does."""
    begun = (Path(output_dir) / "settings.json").exists()
    with suppress(AlreadyFinished):  # killed after its last word
        ppo.train(settings(Path(world), output_dir, resume_from_checkpoint=begun, **changes))


def slow(prompts: Sequence[str], responses: Sequence[str], messages: Any) -> list[float]:
    """Gets a signal while it scores, on the first rank or on both, and takes two seconds."""
    if os.environ["RANK"] == "0" or sys.argv[4] == "both":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)
    return [0.0 for _ in responses]


def stop_and_tell(world: Path, output_dir: Path) -> None:
    """Beside the run, each rank in a file of its own: what it stopped with."""
    changes = {"reward_model_name_or_path": "function:ppo_cases:slow", "share_trunk": True}
    try:
        ppo.train(settings(world, output_dir, gradient_accumulation_steps=1, **changes))
    except StoppedBySignal as stopped:
        place = output_dir.with_name(f"stopped-{os.environ['RANK']}")
        place.write_text(str(stopped.exit_code))


def one_rank() -> None:
    """As a program: the world and the run folder."""
    torch.set_num_threads(1)
    world, output_dir = Path(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3:4] == ["slow"]:
        stop_and_tell(world, output_dir)
    else:
        ppo.train(settings(world, output_dir, gradient_accumulation_steps=1))


if __name__ == "__main__":
    run_process(one_rank)
