"""PPO killed in each phase, at random moments, at each file operation of a save: no bit changes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import Zygote
from ppo_cases import build_world, without_clock
from trainer_cases import metrics_of, same_weights

JOB = "ppo_cases:train_again"
NUM_RANDOM_KILLS = 20

SAMPLE = "rrhf.generation.local.row_loop:pick_tokens"
SCORE = "rrhf.scoring.reward_model:RowScorer.score_rows"
READ = "rrhf.training.online.logprob_pass:LogprobPass._compute_batch"
BACKWARD = "rrhf.training.core.parallel:Parallel.backward"
BEFORE_STEP = "rrhf.training.core.parallel:Parallel.take_step"
AFTER_STEP = "rrhf.training.core.update:Update._metrics"
SAVE_TORCH = "rrhf.training.core.checkpoint:_save_torch"
SEAL = "rrhf.training.core.checkpoint:seal_folder"
SYNC = "rrhf.training.core.checkpoint:sync_folder"
DELETE = "rrhf.training.core.checkpoint:Checkpointer._delete_old"
# Three rollouts of four steps, each step saved. Calls are counted from the resumption.
KILLS = [
    # Rollout 0, and the steps 1 to 4.
    *((SAMPLE, 1), (SAMPLE, 17), (SCORE, 1), (READ, 2), (BACKWARD, 2), (AFTER_STEP, 1), (SEAL, 1)),
    *((DELETE, 1), (SAVE_TORCH, 2), (BEFORE_STEP, 2), (SYNC, 1)),
    # Rollout 1, and the steps 5 to 8.
    *((SAMPLE, 9), (SCORE, 1), (READ, 3), (AFTER_STEP, 2), (SAVE_TORCH, 1), (BACKWARD, 6)),
    # Rollout 2.
    *((SAMPLE, 12), (SCORE, 1), (SEAL, 2)),
]
SETTINGS: dict[str, Any] = {
    "num_rollouts": 3,
    "save_steps": 1,
    "normalize_reward": True,
    "adaptive_kl": True,
    "kl_target": 0.1,
    "kl_horizon": 50.0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def assert_same_run(one: Path, two: Path, rollouts: int = 2) -> None:
    """Policy, value, optimiser, KL coefficient, normaliser and metrics, all but the clock."""
    assert same_weights(one / "policy", two / "policy")
    assert same_weights(one / "value", two / "value")
    newest = [
        max((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
        for run in (one, two)
    ]
    assert newest[0].name == newest[1].name
    mine, its = (torch.load(path / "optimizer.pt", weights_only=True) for path in newest)
    assert mine["param_groups"] == its["param_groups"]
    assert mine["state"].keys() == its["state"].keys() and mine["state"]
    for place, state in mine["state"].items():
        assert all(torch.equal(value, its["state"][place][name]) for name, value in state.items())
    states = [json.loads((path / "trainer_state.json").read_text())["stream"] for path in newest]
    assert states[0]["kl_controller"]["coefficient"] != 0.05, "it has moved from where it began"
    assert states[0]["normalizer"]["count"] > 12 * (rollouts - 1), "it has seen so many rollouts"
    for state in states:
        state["rollout_metrics"] = without_clock(state["rollout_metrics"])
    assert states[0] == states[1]
    rows = [[without_clock(row) for row in metrics_of(run)] for run in (one, two)]
    assert rows[0] == rows[1]
    assert len({(run / "samples.jsonl").read_bytes() for run in (one, two)}) == 1


@pytest.mark.timeout(600)
def test_twenty_kills_change_no_bit(world: Path, tmp_path: Path) -> None:
    """While a rollout is sampled, scored and read, within an update, behind it, within a save."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    settings = {"world": str(world), **SETTINGS}
    with Zygote(JOB, {**settings, "output_dir": str(straight)}) as zygote:
        assert zygote.run()["exit"] == 0
    assert len(KILLS) == 20
    with Zygote(JOB, {**settings, "output_dir": str(run)}) as zygote:
        for call in KILLS:
            assert zygote.run(kill_at_call=call)["signal"] == 9, call
        assert zygote.run()["exit"] == 0
    assert_same_run(run, straight)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_random_kills_change_no_bit(world: Path, tmp_path: Path) -> None:
    """Over rollout, scoring, update and save, wherever the clock strikes."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    settings = {"world": str(world), **SETTINGS}
    with Zygote(JOB, {**settings, "output_dir": str(straight)}) as zygote:
        first = zygote.run()
        assert first["exit"] == 0
    moments, kills = random.Random(5), 0
    with Zygote(JOB, {**settings, "output_dir": str(run)}) as zygote:
        while kills < NUM_RANDOM_KILLS:
            answer = zygote.run(kill_after_seconds=moments.uniform(0.0, 0.9) * first["seconds"])
            if answer["signal"]:
                kills += 1
                continue
            assert answer["exit"] == 0
            assert_same_run(run, straight)
            shutil.rmtree(run)
        assert zygote.run()["exit"] == 0
    assert_same_run(run, straight)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_at_every_file_operation_of_a_save_changes_no_bit(
    world: Path, tmp_path: Path
) -> None:
    """Saves at steps 2 and 4 of five, both within the passes over a rollout or at its end."""
    ends = {"max_steps": 5, "num_rollouts": -1}
    settings = {"world": str(world), **SETTINGS, **ends, "save_steps": 2}
    straight = tmp_path / "straight"
    with Zygote(JOB, {**settings, "output_dir": str(straight)}) as zygote:
        operations = zygote.run(folder=straight / "checkpoints")["operations"]
    assert operations > 20
    run = tmp_path / "run"
    with Zygote(JOB, {**settings, "output_dir": str(run)}) as zygote:
        for operation in range(1, operations + 1):
            killed = zygote.run(kill_at_operation=operation, folder=run / "checkpoints")
            assert killed["signal"] == 9
            assert zygote.run()["exit"] == 0
            assert_same_run(run, straight, rollouts=1)
            shutil.rmtree(run)
