"""The learning rate of every step, against a loop by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rrhf.errors import UserError
from rrhf.training.core.config import TrainingConfig
from rrhf.training.core.optim import build_optimizer, build_scheduler

PEAK, TOTAL, WARMUP = 0.3, 20, 4


def by_hand(kind: str, minimum: float) -> list[float]:
    """Each step's rate: quarters up to the peak from zero, then the schedule's own fall."""
    rates = []
    for step in range(TOTAL):
        progress = (step - WARMUP) / (TOTAL - WARMUP)
        if kind == "constant":
            rates.append(PEAK)
        elif step < WARMUP:
            rates.append(PEAK * step / WARMUP)
        elif kind == "constant_with_warmup":
            rates.append(PEAK)
        elif kind == "linear":
            rates.append(PEAK * (1 - progress))
        else:
            fall = (1 + math.cos(math.pi * progress)) / 2
            rates.append(PEAK * (minimum + (1 - minimum) * fall))
    return rates


@pytest.mark.parametrize(
    ("kind", "minimum"),
    [
        ("linear", 0.0),
        ("cosine", 0.0),
        ("cosine", 0.1),
        ("constant", 0.0),
        ("constant_with_warmup", 0.0),
    ],
)
def test_every_step_has_the_rate_of_the_loop_by_hand(kind: str, minimum: float) -> None:
    config = TrainingConfig(
        "model",
        "run",
        learning_rate=PEAK,
        lr_scheduler_type=kind,  # type: ignore[arg-type]
        min_learning_rate_ratio=minimum,
        warmup_ratio=WARMUP / TOTAL,
    )
    optimizer = build_optimizer(torch.nn.Linear(2, 1), config)
    scheduler = build_scheduler(optimizer, config, TOTAL)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(by_hand(kind, minimum), rel=1e-12)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    config = TrainingConfig("model", "run", learning_rate=PEAK, warmup_ratio=0.0)
    scheduler = build_scheduler(build_optimizer(torch.nn.Linear(2, 1), config), config, TOTAL)
    assert scheduler.get_last_lr()[0] == PEAK


def test_only_matrices_get_weight_decay_and_nothing_trainable_is_said() -> None:
    config = TrainingConfig("model", "run", weight_decay=0.1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.LayerNorm(1))
    groups = build_optimizer(model, config).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim >= 2 else 0.0)
    with pytest.raises(UserError, match="no trainable weight"):
        build_optimizer(model.requires_grad_(False), config)
