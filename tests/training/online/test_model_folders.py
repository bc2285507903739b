"""The models that a run keeps beside the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import training_job
from ppo_cases import build_world, settings
from step_cases import stopped_after
from tiny import save_tiny
from trainer_cases import same_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf.errors import StoppedBySignal
from rrhf.training.online import ppo


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_policies_on_the_way_are_plain_folders(model: str, tmp_path: Path) -> None:
    """Each is what a run that ends there leaves: the order of the data does not depend on it."""
    fixed: dict[str, Any] = {"lr_scheduler_type": "constant", "num_train_epochs": 1}
    training_job.train(model, str(tmp_path / "run"), save_policy_steps=2, **fixed)
    policies = tmp_path / "run" / "policies"
    assert names(policies) == ["step-000002", "step-000004"]
    AutoModelForCausalLM.from_pretrained(policies / "step-000002")
    AutoTokenizer.from_pretrained(policies / "step-000002")
    short = {**fixed, "num_train_epochs": 2 / 5}
    training_job.train(model, str(tmp_path / "short"), **short)
    assert same_weights(policies / "step-000002", tmp_path / "short" / "policy")
    assert not same_weights(policies / "step-000004", tmp_path / "short" / "policy")


def test_ppo_keeps_policies_too(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world")
    short: dict[str, Any] = {"max_steps": 3, "num_rollouts": -1, "save_policy_steps": 1}
    ppo.train(settings(world, tmp_path / "run", **short))
    policies = tmp_path / "run" / "policies"
    assert names(policies) == ["step-000001", "step-000002", "step-000003"]
    assert same_weights(policies / "step-000003", tmp_path / "run" / "policy")


def test_policies_of_undone_steps_are_forgotten_on_resuming(model: str, tmp_path: Path) -> None:
    """Stopped at step 5; the folders of steps 6 and 7 are as if left by a process that died."""
    run = tmp_path / "run"
    with stopped_after(5), pytest.raises(StoppedBySignal):
        training_job.train(model, str(run), save_policy_steps=5)
    for name in ("step-000006", "step-000007", ".staged-step-000010"):
        (run / "policies" / name).mkdir()
    training_job.train(model, str(run), resume=True, save_policy_steps=5)
    assert names(run / "policies") == ["step-000005", "step-000010"]
    assert same_weights(run / "policies" / "step-000010", run / "policy")
