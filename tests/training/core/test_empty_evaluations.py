"""An evaluation that gives no figures, or fails, loses nothing of what was trained."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import training_job
from ppo_cases import build_world
from tiny import save_tiny
from trainer_cases import metrics_of, same_weights, write_lines

from rrhf.cli.main import main
from rrhf.errors import UserError
from rrhf.manifests import read_manifest
from rrhf.records import CandidateSet
from rrhf.scoring.reward_model import RewardModelScorer
from rrhf.training.core import loop
from rrhf.training.core.best import BestModel
from rrhf.training.online.experience import RolloutRow
from rrhf.training.online.ppo import EVALUATION_ROUND
from rrhf.training.online.rollout import RolloutWriter

torch.set_num_threads(1)


def unscored(prompts: Sequence[str], responses: Sequence[str], messages: Any) -> list[Any]:
    """Held-out prompts get no score."""
    return [
        None if "held out" in prompt else float("e" in response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def half_scored(prompts: Sequence[str], responses: Sequence[str], messages: Any) -> list[Any]:
    """Every other held-out prompt gets none."""
    return [
        None if "held out 1" in prompt else float("e" in response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_world(tmp_path_factory.mktemp("world"))
    rows = [
        {"query": f"held out {number % 2}: say {number}", "responses": []} for number in range(4)
    ]
    write_lines(folder / "held_out.jsonl", rows)
    return folder


def words(world: Path, run: Path, **changes: Any) -> list[str]:
    flags = {
        "model_name_or_path": world / "model",
        "output_dir": run,
        "train_datasets": world / "prompts.jsonl",
        "eval_datasets": world / "held_out.jsonl",
        "reward_model_name_or_path": "function:test_empty_evaluations:unscored",
        "share_trunk": "true",
        "rollout_size": 4,
        "num_rollouts": 2,
        "ppo_epochs": 1,
        "max_new_tokens": 4,
        "model_max_length": 100,
        "per_device_train_batch_size": 2,
        "chat_format": "raw",
        "learning_rate": 1e-3,
        "save_steps": 0,
        **changes,
    }
    given = (word for name, value in flags.items() for word in (f"--{name}", str(value)))
    return ["train", "ppo", *given]


def none_fits(patch: pytest.MonkeyPatch) -> None:
    """The window of a reward model holds what is trained on alone."""
    fits = RewardModelScorer.fits

    def shorter(self: RewardModelScorer, s: CandidateSet, candidate: Any) -> bool:
        return "held out" not in s.query and fits(self, s, candidate)

    score = RewardModelScorer.score

    def scored(self: RewardModelScorer, sets: Sequence[CandidateSet]) -> list[list[Any]]:
        found = score(self, sets)
        return [
            [None] * len(row) if "held out" in s.query else row
            for s, row in zip(sets, found, strict=True)
        ]

    patch.setattr(RewardModelScorer, "fits", shorter)
    patch.setattr(RewardModelScorer, "score", scored)


def none_speaks(patch: pytest.MonkeyPatch) -> None:
    """The policy ends held-out responses at once."""
    sample = RolloutWriter._sample

    def silent(
        self: RolloutWriter, prompts: Any, places: Any, number: int, each: Any, counts: Counter[str]
    ) -> list[RolloutRow]:
        rows = sample(self, prompts, places, number, each, counts)
        if number != EVALUATION_ROUND:
            return rows
        counts["empty"] = counts["sampled"]
        return []

    patch.setattr(RolloutWriter, "_sample", silent)


REASONS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "none scored": (None, {}, "4 of 4 responses could not be scored"),
    "too few scored": (
        None,
        {"reward_model_name_or_path": "function:test_empty_evaluations:half_scored"},
        "2 of 4 responses could not be scored, more than --max_unscored_fraction 0.01",
    ),
    "none scored, as is allowed": (
        None,
        {"max_unscored_fraction": 1.0},
        "scored none of the 4 responses of a rollout (4 without a score, 0 beyond its window, 0",
    ),
    "none fits": (
        none_fits,
        {"reward_model_name_or_path": "reward"},
        "none of the 4 responses of a rollout fits its window",
    ),
    "none speaks": (none_speaks, {}, "all 4 responses of a rollout are empty"),
}


@pytest.mark.parametrize("name", REASONS)
def test_ppo_without_figures_still_writes_its_policy(
    name: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every second step and at the end; the best looks at such evaluations as little."""
    patched, changes, reason = REASONS[name]
    if changes.get("reward_model_name_or_path") == "reward":
        changes = {**changes, "reward_model_name_or_path": world / "reward"}
    if patched is not None:
        patched(monkeypatch)
    run, plain = tmp_path / "run", tmp_path / "plain"
    asked = {**changes, "eval_steps": 1, "load_best_model_at_end": "true"}
    asked["early_stopping_patience"] = 1
    assert main(words(world, run, **asked)) == 0
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [reason in line for line in told if "gives no figures" in line] == [True]
    assert any("--load_best_model_at_end: there is no best model" in line for line in told)
    manifest = read_manifest(run) or {}
    assert manifest["status"] == "complete" and manifest["steps"] == 4
    assert (manifest["evaluation"], manifest["best"]) == ({}, None)
    assert not any(key.startswith("eval_") for row in metrics_of(run) for key in row)
    without = [word for word in words(world, plain, **changes)]
    place = without.index("--eval_datasets")
    assert main(without[:place] + without[place + 2 :]) == 0
    assert same_weights(run / "policy", plain / "policy")


def test_a_rollout_without_scores_still_ends_the_run(world: Path, tmp_path: Path) -> None:
    """Only what nothing is learnt from goes on without."""
    changes = {"train_datasets": world / "held_out.jsonl"}
    assert main(words(world, tmp_path / "run", **changes)) == 2


def test_the_best_looks_past_what_has_no_figures(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model"))
    found = iter([{"loss": 3.0}, {}, {"loss": 2.0}, {}, {}])
    changes = {"eval_steps": 1, "num_train_epochs": 1, "early_stopping_patience": 2}
    outcome = training_job.train(
        model, str(tmp_path / "run"), evaluate=lambda model: dict(next(found)), **changes
    )
    assert outcome.steps == 5 and outcome.best is not None
    assert (outcome.best.step, outcome.best.evaluations_without_gain) == (3, 0)
    rows = [row for row in metrics_of(tmp_path / "run") if "loss" not in row]
    assert rows == [{"step": 1, "eval_loss": 3.0}, {"step": 3, "eval_loss": 2.0}]


@pytest.mark.parametrize(
    ("place", "eval_steps"),
    [("evaluate", 0), ("evaluate", 2), ("evaluate", 3), ("best", 2), ("best", 3)],
)
def test_where_an_evaluation_fails_its_step_is_kept(
    place: str, eval_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the way or behind the last step; it is made again on resuming, and no step is."""
    model = str(save_tiny(tmp_path / "model"))
    made: list[int] = []
    failing = 2 if eval_steps == 2 else 1

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        made.append(len(made))
        if place == "evaluate" and len(made) == failing:
            raise RuntimeError("the scorer fell over")
        return {"loss": 1.0 / len(made)}

    def full(self: Any, overtaken: int | None) -> None:
        raise UserError("no space for the best")

    settings: dict[str, Any] = {"num_train_epochs": 0.8, "save_steps": 0}
    settings["eval_steps"] = eval_steps
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if place == "best":
            patch.setattr(BestModel, "_replace", full)
        with pytest.raises((RuntimeError, UserError), match=r"fell over|no space for the best"):
            training_job.train(model, str(run), evaluate=evaluate, **settings)
    (kept,) = (run / "checkpoints").iterdir()
    step = int(kept.name.removeprefix("step-"))
    assert step == (4 if place == "evaluate" and eval_steps != 3 else eval_steps)
    calls: list[int] = []
    update = loop.Update.__call__

    def counted(self: Any, *args: Any) -> Any:
        calls.append(args[1])
        return update(self, *args)

    monkeypatch.setattr(loop.Update, "__call__", counted)
    outcome = training_job.train(model, str(run), resume=True, evaluate=evaluate, **settings)
    assert calls == list(range(step + 1, 5)) and outcome.steps == 4
    rows = [(row["step"], "loss" in row) for row in metrics_of(run)]
    assert len(rows) == len(set(rows)) and (4, False) in rows
    assert (step, False) in rows
    plain = tmp_path / "plain"
    training_job.train(model, str(plain), **settings)
    assert same_weights(run / "policy", plain / "policy")
    if eval_steps:
        assert (read_manifest(run) or {})["best"]["folder"] == "best"
