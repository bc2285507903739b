"""A step is evaluated once, however often and wherever its run is cut and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_job
from tiny import save_tiny
from torch import nn
from trainer_cases import metrics_of, same_weights

from rrhf.errors import StoppedBySignal
from rrhf.training.core.checkpoint import Checkpointer

torch.set_num_threads(1)

EVERY_OTHER: dict[str, Any] = {"num_train_epochs": 1.2, "eval_steps": 2, "save_steps": 2}
"""Six steps, evaluated and kept at 2, 4 and 6."""


class PowerCut(RuntimeError):
    """Ends a run where it stands."""


class Evaluation:
    """A number of the weights, as an evaluation, and how often it was asked for."""

    def __init__(self, stops_at: int = 0) -> None:
        self.calls, self._stops_at = 0, stops_at

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.calls += 1
        if self.calls == self._stops_at:
            raise StoppedBySignal(75, "a signal came during the evaluation")
        return {"loss": float(sum(p.double().abs().sum() for p in model.parameters()))}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def straight(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    evaluation = Evaluation()
    training_job.train(model, str(run), evaluate=evaluation, **EVERY_OTHER)
    assert evaluation.calls == 3
    return run


def rows(run: Path) -> list[dict[str, float]]:
    kept = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics_of(run)]
    assert sum("eval_loss" in row for row in kept) == 3
    return kept


@pytest.mark.parametrize(("saved", "left"), [(1, 2), (2, 1), (3, 0)])
def test_after_a_cut_behind_a_checkpoint_nothing_is_evaluated_twice(
    saved: int, left: int, model: str, straight: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The last: all is done but the model's folder, and no evaluation is left."""
    save = Checkpointer.save

    def save_and_die(self: Checkpointer, step: int, *args: Any) -> Path:
        path = save(self, step, *args)
        if step == 2 * saved:
            raise PowerCut
        return path

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", save_and_die)
        with pytest.raises(PowerCut):
            training_job.train(model, str(run), evaluate=Evaluation(), **EVERY_OTHER)
    evaluation = Evaluation()
    outcome = training_job.train(model, str(run), True, evaluate=evaluation, **EVERY_OTHER)
    assert evaluation.calls == left
    assert rows(run) == rows(straight)
    assert outcome.evaluation["loss"] == rows(straight)[-1]["eval_loss"]
    assert same_weights(run / "policy", straight / "policy")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_evaluation_that_a_signal_ended_is_done_on_resuming(
    number: int, model: str, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopping = Evaluation(stops_at=number)
    with pytest.raises(StoppedBySignal, match=f"step {2 * number} of 6"):
        training_job.train(model, str(run), evaluate=stopping, **EVERY_OTHER)
    evaluation = Evaluation()
    training_job.train(model, str(run), True, evaluate=evaluation, **EVERY_OTHER)
    assert evaluation.calls == 4 - number
    assert rows(run) == rows(straight)
    assert same_weights(run / "policy", straight / "policy")


def test_a_cut_before_a_checkpoint_evaluates_its_step_again(
    model: str, straight: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The row of the undone step is cut from the metrics, and comes back the same."""

    def die(self: Checkpointer, step: int, *args: Any) -> Path:
        if step == 4:
            raise PowerCut
        return save(self, step, *args)

    save, run = Checkpointer.save, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", die)
        with pytest.raises(PowerCut):
            training_job.train(model, str(run), evaluate=Evaluation(), **EVERY_OTHER)
    assert [row["step"] for row in metrics_of(run) if "eval_loss" in row] == [2, 4]
    evaluation = Evaluation()
    training_job.train(model, str(run), True, evaluate=evaluation, **EVERY_OTHER)
    assert evaluation.calls == 2
    assert rows(run) == rows(straight)
