"""AdamW with its parameter groups, and the learning rate over the steps."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import get_scheduler

from rrhf.errors import UserError
from rrhf.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over every weight that needs a gradient; vectors (norms, biases) get no weight decay.

    Raises:
        UserError: nothing is trainable, or trainable weights are not float32.
    """
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise UserError("the model has no trainable weight; check the LoRA target modules")
    wrong = [n for n, p in trainable if p.dtype != torch.float32]
    assert not wrong, f"trained weights must be float32, {wrong[0]} is not"
    matrices = [p for _, p in trainable if p.ndim >= 2]
    vectors = [p for _, p in trainable if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over `total_steps` optimiser steps, warm-up included."""
    name, extra = config.lr_scheduler_type, {}
    if config.min_learning_rate_ratio > 0:
        if name != "cosine":
            raise UserError(
                f"min_learning_rate_ratio {config.min_learning_rate_ratio}: only the cosine "
                f"schedule ends above zero, not {name}"
            )
        name = "cosine_with_min_lr"  # type: ignore[assignment]
        extra = {"min_lr_rate": config.min_learning_rate_ratio}
    warmup = math.ceil(config.warmup_ratio * total_steps)
    return get_scheduler(name, optimizer, warmup, total_steps, scheduler_specific_kwargs=extra)
