"""The loop around a model of four weights: what it calls, when, and what a resumed run finds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from step_cases import stopped_after
from torch import Tensor, nn
from trainer_cases import metrics_of
from update_cases import SETS, Table, Terms

from rrhf.data.collate import TokenBatch, collate
from rrhf.errors import StoppedBySignal
from rrhf.runs import RunFolder
from rrhf.training.core.checkpoint import Checkpointer, checkpoints_by_step
from rrhf.training.core.config import TrainingConfig
from rrhf.training.core.hooks import Hook
from rrhf.training.core.loop import TrainingOutcome, run_training
from rrhf.training.core.model_folders import ModelFolders
from rrhf.training.core.opened_run import OpenedRun
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.phases import PeakMeter, Phases
from rrhf.training.core.streams import LiveStream
from rrhf.training.core.tracking import Tracker

TOKENS = 14
"""Of a step: every row with its prompt."""


class Watched(Table):
    """Notes how each forward is made."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards: list[tuple[bool, bool]] = []
        self.rows: list[int] = []
        self.eval()  # as models are loaded

    def forward(self, batch: TokenBatch) -> Tensor:
        self.forwards.append((self.training, torch.is_grad_enabled()))
        self.rows.append(batch.num_rows)
        return super().forward(batch)


class Live:
    """The same step again and again; what it remembers is a number and a tensor."""

    def __init__(self, count: int, at_step: Callable[[int], None] = lambda step: None) -> None:
        self.total_steps, self.at_step = count, at_step
        self.step, self.sum = 0, torch.zeros(1)

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        while self.step < self.total_steps:
            self.at_step(self.step)
            self.step += 1
            self.sum = self.sum + self.step
            yield [collate(SETS[:1], 0), collate(SETS[1:], 0)]

    def take_news(self) -> dict[str, float]:
        return {"news": 1.0} if self.step == 1 else {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def tensors(self) -> dict[str, Tensor]:
        return {"sum": self.sum}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.sum = tensors["sum"]


class Watching(Hook):
    """Notes what it hears of; what it remembers is the number of steps, twice."""

    name = "watch"

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.steps, self.sum = 0, torch.zeros(1)

    def begin(self, tracker: Tracker, optimizer: torch.optim.Optimizer) -> None:
        self.heard.append(("begin", self.steps, float(self.sum)))

    def before_step(self, step: int) -> None:
        self.heard.append(("before", step))

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.heard.append(("after", step, metrics["loss"]))
        self.steps, self.sum = step, self.sum + step

    def metrics(self) -> dict[str, float]:
        return {"sum": float(self.sum)}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.heard.append(("load", dict(state)))
        self.steps = state.get("steps", 0)

    def tensors(self) -> dict[str, Tensor]:
        return {"sum": self.sum}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        assert self.heard[-1][0] == "load"  # the state comes first
        self.sum = tensors["sum"]


class Begins(Hook):
    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do

    def begin(self, tracker: Tracker, optimizer: torch.optim.Optimizer) -> None:
        self._do()


class Adding(Hook):
    """One more micro-batch in each step."""

    def batches(self) -> list[TokenBatch]:
        return [collate(SETS[2:], 0)]


def go(
    folder: Path, stream: Live | int = 6, evaluate: Any = None, **changes: Any
) -> tuple[TrainingOutcome, Watched]:
    more = {name: changes.pop(name) for name in ("models", "hooks") if name in changes}
    phases = changes.pop("phases", None)
    on_parallel = changes.pop("on_parallel", lambda parallel: None)
    values: dict[str, Any] = {
        "learning_rate": 0.1,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "save_steps": 0,
        "max_grad_norm": 0.0,
        **changes,
    }
    config = TrainingConfig("model", str(folder), **values)
    run, parallel, model = RunFolder(folder), Parallel(), Watched()
    run.open(config.as_dict(), config.resume_from_checkpoint)
    try:
        outcome = run_training(
            model,
            Terms(),
            Live(stream) if isinstance(stream, int) else stream,
            OpenedRun(config, run, parallel, phases=phases),
            evaluate,
            hooks=[Begins(lambda: on_parallel(parallel)), *more.pop("hooks", [])],
            **more,
        )
    finally:
        run.close()
    return outcome, model


def rows(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name != "tokens_per_second"}
        for row in metrics_of(folder)
    ]


def steps_of(folder: Path, name: str) -> list[float]:
    """The steps of the rows that have such a number."""
    return [row["step"] for row in rows(folder) if name in row]


def test_the_main_rank_alone_writes(tmp_path: Path) -> None:
    def join(parallel: Parallel) -> None:
        parallel.rank = 1

    go(tmp_path / "run", 3, Evaluation(), eval_steps=1, on_parallel=join)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not rows(tmp_path / "run")


@pytest.mark.parametrize("first_goes_on", [False, True])
def test_the_first_rank_says_whether_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_goes_on: bool
) -> None:
    """A late rank looks for a run where the first has begun one; each alone would wait for ever."""
    monkeypatch.setattr(Parallel, "gather", lambda parallel, rows: [first_goes_on, *rows])
    restored: list[Checkpointer] = []
    monkeypatch.setattr(Checkpointer, "restore", lambda one: restored.append(one))
    go(tmp_path / "run", 1, resume_from_checkpoint=not first_goes_on)
    assert len(restored) == first_goes_on


class Evaluation:
    """The first weight; notes when and how it is asked for."""

    def __init__(self, fail_at: int = -1) -> None:
        self.calls, self.fail_at = 0, fail_at
        self.modes: list[tuple[bool, bool]] = []

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise StoppedBySignal(75, "while it evaluates")
        self.modes.append((model.training, torch.is_grad_enabled()))
        return {"loss": float(next(model.parameters())[1])}


def test_the_stand_in_is_a_live_stream() -> None:
    assert isinstance(Live(1), LiveStream)


def test_training_is_in_training_mode_and_evaluation_is_not(tmp_path: Path) -> None:
    evaluate = Evaluation()
    outcome, model = go(tmp_path / "run", 5, evaluate, eval_steps=2)
    assert steps_of(tmp_path / "run", "eval_loss") == [2, 4, 5]
    assert evaluate.modes == [(False, False)] * 3
    assert model.forwards == [(True, True)] * 10
    assert outcome.evaluation == {"loss": model.weight[1].item()}


def test_a_step_is_evaluated_once(tmp_path: Path) -> None:
    """The last one is due, and comes at the end."""
    evaluate = Evaluation()
    go(tmp_path / "run", 4, evaluate, eval_steps=2)
    assert steps_of(tmp_path / "run", "eval_loss") == [2, 4] and evaluate.calls == 2
    go(tmp_path / "never", 4, evaluate, eval_steps=0)
    assert steps_of(tmp_path / "never", "eval_loss") == [4]


def test_the_rows_of_a_run(tmp_path: Path) -> None:
    hook = Watching()
    outcome, _ = go(tmp_path / "run", 6, hooks=[hook])
    found = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    rates = [0.1 * (1 - done / 6) for done in range(6)]  # the rate that the step was taken with
    assert [row["learning_rate"] for row in found] == pytest.approx(rates)
    assert [row["sum"] for row in found] == [1, 3, 6, 10, 15, 21]
    assert hook.heard[:2] == [("load", {}), ("begin", 0, 0.0)]
    assert hook.heard[2:] == [
        event
        for row in found
        for event in (("before", row["step"]), ("after", row["step"], row["loss"]))
    ]
    assert steps_of(tmp_path / "run", "news") == [0]
    assert (outcome.steps, outcome.tokens) == (6, 6 * TOKENS)
    assert outcome.metrics["loss"] == found[-1]["loss"] and not outcome.stopped_early
    go(tmp_path / "seldom", 6, logging_steps=4)
    assert steps_of(tmp_path / "seldom", "loss") == [4, 6]  # the last is logged in any case


def test_checkpoints_come_when_they_are_due(tmp_path: Path) -> None:
    go(tmp_path / "run", 5, save_steps=2, save_total_limit=9)
    found = [path.name for path in checkpoints_by_step(tmp_path / "run" / "checkpoints")]
    assert found == ["step-2", "step-4"]


def test_further_micro_batches_of_a_step_come_before_the_streams(tmp_path: Path) -> None:
    outcome, model = go(tmp_path / "run", 3, hooks=[Adding()])
    assert model.rows == [1, 2, 2] * 3
    assert outcome.tokens == 3 * (TOKENS + 4)


def stop_at(step: int, how: Callable[[], None]) -> Callable[[int], None]:
    return lambda now: how() if now == step else None


def signalled() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def killed() -> None:
    raise MemoryError("as if the machine had gone")


def stopped() -> None:
    raise StoppedBySignal(75, "the rollout is dropped")


@pytest.mark.parametrize("step", [1, 3, 4])
@pytest.mark.parametrize("how", [signalled, killed, stopped])
def test_a_resumed_run_is_the_straight_one(
    tmp_path: Path, how: Callable[[], None], step: int
) -> None:
    """Stopped before its step; with a signal after it, with a kill at the checkpoint before."""
    settings: dict[str, Any] = {"save_steps": 2, "eval_steps": 3}

    def hooks() -> list[Hook]:
        return [Watching(), Adding()]

    straight, model = go(tmp_path / "straight", 6, Evaluation(), hooks=hooks(), **settings)
    with pytest.raises((StoppedBySignal, MemoryError)):
        stopping = Live(6, stop_at(step, how))
        go(tmp_path / "run", stopping, Evaluation(), hooks=hooks(), **settings)
    stream, settings["resume_from_checkpoint"] = Live(6), True
    resumed, again = go(tmp_path / "run", stream, Evaluation(), hooks=hooks(), **settings)
    assert torch.equal(model.weight, again.weight)
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    assert float(stream.sum) == 21
    assert (resumed.steps, resumed.evaluation) == (6, straight.evaluation)
    known = {signalled: step + 1, stopped: step, killed: step // 2 * 2}[how]
    assert resumed.tokens == (TOKENS + 4) * (6 - known)  # those of this process


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_steps": 2}
    go(tmp_path / "straight", 6, Evaluation(), **settings)
    with pytest.raises(StoppedBySignal):
        go(tmp_path / "run", 6, Evaluation(fail_at=2), **settings)
    evaluate = Evaluation()
    go(tmp_path / "run", 6, evaluate, resume_from_checkpoint=True, **settings)
    assert evaluate.calls == 2
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_a_step_that_was_evaluated_before_the_stop_is_not_evaluated_again(tmp_path: Path) -> None:
    """A signal comes within step 2, whose evaluation is still done."""

    with stopped_after(2), pytest.raises(StoppedBySignal, match="step 2 of 4"):
        go(tmp_path / "run", 4, Evaluation(), eval_steps=2)
    evaluate = Evaluation()
    go(tmp_path / "run", 4, evaluate, eval_steps=2, resume_from_checkpoint=True)
    assert evaluate.calls == 1
    assert steps_of(tmp_path / "run", "eval_loss") == [2, 4]


def test_a_signal_to_another_rank_ends_the_run_here_too(tmp_path: Path) -> None:
    def join(parallel: Parallel) -> None:
        parallel.max = lambda value: max(value, 130.0)  # type: ignore[method-assign]

    with pytest.raises(StoppedBySignal, match="step 1 of 4") as stopping:
        go(tmp_path / "run", 4, on_parallel=join)
    assert stopping.value.exit_code == 130
    assert [p.name for p in checkpoints_by_step(tmp_path / "run" / "checkpoints")] == ["step-1"]


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    """A run that is stopped before its first step had nothing to add to it."""
    with pytest.raises(StoppedBySignal):
        go(tmp_path / "run", Live(4, stop_at(2, stopped)))
    (before,) = checkpoints_by_step(tmp_path / "run" / "checkpoints")
    place = before.stat().st_ino
    with pytest.raises(StoppedBySignal):
        go(tmp_path / "run", Live(4, stop_at(2, stopped)), resume_from_checkpoint=True)
    (after,) = checkpoints_by_step(tmp_path / "run" / "checkpoints")
    assert after == before and after.stat().st_ino == place


def models(model_of: Callable[[], float] = lambda: 0.0) -> ModelFolders:
    def write(folder: Path, earlier: Path, weights: Any) -> None:
        (folder / "weights").write_text("some")

    return ModelFolders({"policy": write})


@pytest.mark.parametrize(("count", "is_early"), [(3, False), (6, True)])
def test_steps_are_left_out_only_where_some_were_left(
    tmp_path: Path, count: int, is_early: bool
) -> None:
    """The same value three times: the patience of two is at its end after step 3."""
    outcome, _ = go(
        tmp_path / "run",
        count,
        lambda model: {"loss": 1.0},
        models=models(),
        eval_steps=1,
        early_stopping_patience=2,
        metric_for_best_model="loss",
    )
    assert (outcome.steps, outcome.stopped_early) == (3, is_early)


def test_a_best_that_was_overtaken_is_kept_until_a_checkpoint_knows_the_new_one(
    tmp_path: Path,
) -> None:
    """Each evaluation is better than the one before; checkpoints come after steps 2 and 4."""
    run, hidden = tmp_path / "run", []

    def evaluate(model: nn.Module) -> dict[str, float]:
        hidden.append(sorted(path.name for path in run.glob(".best-step-*")))
        return {"loss": -float(len(hidden))}

    settings: dict[str, Any] = {"eval_steps": 1, "save_steps": 2, "save_best_model": True}
    go(run, 5, evaluate, models=models(), metric_for_best_model="loss", **settings)
    # Seen by the evaluation of each step; the best of step 2 is overtaken in step 3.
    assert hidden[:4] == [[], [], [], [".best-step-2"]] and hidden[4] == []


def test_models_on_the_way_are_kept(tmp_path: Path) -> None:
    go(tmp_path / "run", 5, models=models(), save_policy_steps=2)
    kept = sorted(path.name for path in (tmp_path / "run" / "policies").iterdir())
    assert kept == ["step-000002", "step-000004"]


def test_a_phase_counts_the_tokens_of_its_own_rank(tmp_path: Path) -> None:
    """The other of two ranks has done as much."""
    phases = Phases(PeakMeter())

    def join(parallel: Parallel) -> None:
        parallel.world_size = 2
        accelerator: Any = parallel.accelerator
        accelerator.reduce = lambda values, reduction: values * 2

    outcome, _ = go(tmp_path / "run", 3, phases=phases, on_parallel=join)
    assert outcome.tokens == 2 * 3 * TOKENS
    assert phases.total["train"].tokens == 3 * TOKENS
