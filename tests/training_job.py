"""A tiny but real training, as a function that tests run, kill and resume."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rrhf.data.collate import EncodedSet, TokenBatch
from rrhf.errors import AlreadyFinished
from rrhf.manifests import UNFINISHED, write_manifest
from rrhf.models.forward.logprobs import Policy, PolicyOutputs
from rrhf.training.core.config import TrainingConfig
from rrhf.training.core.loop import TrainingOutcome, run_training
from rrhf.training.core.model_folders import ModelFolders
from rrhf.training.core.setup import (
    finish_run,
    load_trainable_causal_lm,
    model_writer,
    opened_workbench,
)
from rrhf.training.core.streams import OfflineStream, StepCut
from rrhf.training.core.update import Term

FOUR_STEPS: dict[str, Any] = {"num_train_epochs": 0.8, "save_steps": 2}


class TokenLikelihood:
    """The simplest objective: the mean negative log-prob of the response tokens."""

    def denominators(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"sft": (batch.response_lengths * batch.row_weights).sum()}

    def __call__(self, outputs: PolicyOutputs, batch: TokenBatch) -> dict[str, Term]:
        total = -(outputs.logprobs.sum(1) * batch.row_weights).sum()
        lengths = (batch.response_lengths * batch.row_weights).sum()
        return {"sft": Term(total, 1.0, {"length": (lengths, batch.row_weights.sum())})}


def examples(count: int = 19) -> list[EncodedSet]:
    shuffle = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(5, 300, (length,), generator=shuffle).tolist()

    return [
        EncodedSet(ids(i % 5 + 1), [ids(i % 4 + 1) for _ in range(i % 3 + 1)]) for i in range(count)
    ]


def train(
    model: str,
    output_dir: str,
    resume: bool = False,
    examples_count: int = 19,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    **changes: Any,
) -> TrainingOutcome:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
    }
    config = TrainingConfig(
        model_name_or_path=model,
        output_dir=output_dir,
        resume_from_checkpoint=resume,
        model_max_length=64,
        **{**settings, **changes},
    )
    with opened_workbench(config) as bench:
        inner = load_trainable_causal_lm(config)
        cut = StepCut(
            bench.codec.pad_id,
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            bench.parallel.rank,
            bench.parallel.world_size,
        )
        stream = OfflineStream(
            examples(examples_count), cut, config.num_train_epochs, seed=config.seed
        )
        models = ModelFolders({"policy": model_writer(bench, inner)})
        outcome = run_training(
            Policy(inner), TokenLikelihood(), stream, bench, evaluate, models=models
        )
        finish_run(bench, outcome, models, {})
    return outcome


def train_with_resume(model: str, output_dir: str) -> None:
    """What a user's restart script does: start, or go on."""
    started = (Path(output_dir) / "settings.json").exists()
    with suppress(AlreadyFinished):
        train(model, output_dir, resume=started)


def unfinish(run: Path) -> None:
    """Make a finished run look like one that was killed before its manifest was written."""
    write_manifest(run, {"status": UNFINISHED})


def train_two_processes(model: str, output_dir: str) -> None:
    """One rank of two; the same global batch as `train`'s default."""
    train(model, output_dir, gradient_accumulation_steps=1)


def finished_run(model: str, folder: Path) -> Path:
    """A run of four steps, with checkpoints 2 and 4."""
    train(model, str(folder / "run"), **FOUR_STEPS)
    return folder / "run"
