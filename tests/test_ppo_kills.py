"""PPO killed at random moments and at every file operation of a save: no bit may change."""

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
NUM_KILLS = 20
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


def assert_same_run(one: Path, two: Path) -> None:
    """Policy, value, optimiser, KL coefficient, normaliser and metrics, all but the clock."""
    assert same_weights(one / "policy", two / "policy")
    assert same_weights(one / "value", two / "value")
    newest = [
        max((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
        for run in (one, two)
    ]
    assert newest[0].name == newest[1].name
    mine, its = (torch.load(path / "optimizer.pt", weights_only=True) for path in newest)
    for place, state in mine["state"].items():
        assert all(torch.equal(value, its["state"][place][name]) for name, value in state.items())
    states = [json.loads((path / "trainer_state.json").read_text())["stream"] for path in newest]
    for state in states:
        state["rollout_metrics"] = without_clock(state["rollout_metrics"])
    assert states[0] == states[1]
    rows = [[without_clock(row) for row in metrics_of(run)] for run in (one, two)]
    assert rows[0] == rows[1]
    assert len({(run / "samples.jsonl").read_bytes() for run in (one, two)}) == 1


@pytest.mark.timeout(300)
def test_twenty_random_kills_change_no_bit(world: Path, tmp_path: Path) -> None:
    """Over rollout, scoring, update and save, wherever the clock strikes."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    settings = {"world": str(world), **SETTINGS}
    with Zygote(JOB, {**settings, "output_dir": str(straight)}) as zygote:
        first = zygote.run()
        assert first["exit"] == 0
    moments, kills = random.Random(5), 0
    with Zygote(JOB, {**settings, "output_dir": str(run)}) as zygote:
        while kills < NUM_KILLS:
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
            assert_same_run(run, straight)
            shutil.rmtree(run)
