"""A signal during a rollout: answered at once, nothing changed, and the rest is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import TESTS
from ppo_cases import build_world, settings, without_clock
from trainer_cases import metrics_of, same_weights

from rrhf.errors import StoppedBySignal
from rrhf.generation.local import row_loop
from rrhf.scoring.reward_model import RewardModelScorer
from rrhf.training.online import logprob_pass, ppo

SETTINGS: dict[str, Any] = {
    "normalize_reward": True,
    "adaptive_kl": True,
    "kl_target": 0.1,
    "kl_horizon": 50.0,
    "eval_steps": 4,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    ppo.train(settings(world, run, **evaluated(world)))
    return run


def evaluated(world: Path) -> dict[str, Any]:
    return {**SETTINGS, "eval_datasets": str(world / "prompts.jsonl")}


def rows_of(run: Path) -> list[dict[str, float]]:
    return [without_clock(row) for row in metrics_of(run)]


def signalled_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; its `call`-th call gets a signal first, and must not come any further."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            raise AssertionError("the signal was not answered")
        return function(*args, **kwargs)

    return wrapped


# Rollout 0 (12 responses), four steps, evaluation (6), rollout 1, four steps, evaluation.
@pytest.mark.parametrize(
    ("owner", "name", "call", "step"),
    [
        (row_loop, "pick_tokens", 3, 0),
        (RewardModelScorer, "score", 2, 4),
        (logprob_pass.LogprobPass, "_compute_batch", 6, 4),
        (RewardModelScorer, "score", 4, 8),
    ],
    ids=["first-rollout", "evaluation", "second-rollout", "last-evaluation"],
)
def test_a_signal_within_a_rollout_is_answered_at_once(
    world: Path,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    step: int,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled_at(call, getattr(owner, name)))
        with pytest.raises(StoppedBySignal, match=f"step {step} of 8") as stopped:
            ppo.train(settings(world, run, **evaluated(world)))
    assert stopped.value.exit_code == 75
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{step}"
    ppo.train(settings(world, run, resume_from_checkpoint=True, **evaluated(world)))
    assert rows_of(run) == rows_of(straight)
    for folder in ("policy", "value"):
        assert same_weights(run / folder, straight / folder)
    one, two = (json.loads((path / "manifest.json").read_text()) for path in (run, straight))
    for key in ("kl_coefficient", "score_normalizer", "data", "evaluation"):
        assert one[key] == two[key]


@pytest.mark.parametrize(
    "everyone", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "both"]
)
def test_two_processes_stop_together(world: Path, tmp_path: Path, everyone: bool) -> None:
    """One rank alone gets the signal, or both; the scorer takes 2 s a call."""
    job = TESTS / "ppo_cases.py"
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(job)]
    words += [str(world), str(tmp_path / "run"), "slow", "both" if everyone else "one"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=540
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):  # a pipe that both write to may tear their lines
        assert (tmp_path / f"stopped-{rank}").read_text() == "75"
    assert (tmp_path / "run" / "checkpoints" / "step-0" / "manifest.json").is_file()
