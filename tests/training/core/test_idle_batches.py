"""Batches from which the policy learns nothing: the commands go on, and its weights stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from ppo_cases import build_world
from trainer_cases import metrics_of, same_weights

from rrhf.cli.main import main

COMMON = (
    "--num_rollouts 1 --rollout_size 6 --ppo_epochs 1 --per_device_train_batch_size 3 "
    "--max_new_tokens 4 --model_max_length 100 --chat_format raw --save_steps 0"
)
CASES = {
    "warm-up, entropy": (
        "--method ppo --reward_model_name_or_path {world}/reward "
        "--entropy_coeff 0.01 --critic_warmup_steps 2"
    ),
    "warm-up, recomputed": (
        "--method ppo --reward_model_name_or_path {world}/reward "
        "--critic_warmup_steps 2 --gradient_checkpointing"
    ),
    "tied groups, recomputed": (
        "--method grpo --reward_model_name_or_path function:ppo_cases:nothing "
        "--num_return_sequences 3 --kl_coeff 0 --gradient_checkpointing"
    ),
    "tied groups, kept": (
        "--method grpo --reward_model_name_or_path function:ppo_cases:nothing "
        "--num_return_sequences 3 --kl_coeff 0"
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("case", CASES)
def test_a_step_without_gradient_leaves_the_policy_as_it_was(
    world: Path, tmp_path: Path, case: str
) -> None:
    words = [
        *("train", "ppo", "--model_name_or_path", str(world / "model")),
        *("--train_datasets", str(world / "prompts.jsonl"), "--output_dir", str(tmp_path / "run")),
        *f"{CASES[case]} {COMMON}".format(world=world).split(),
    ]
    assert main(words) == 0
    rows = [row for row in metrics_of(tmp_path / "run") if "loss" in row]
    assert len(rows) == 2
    assert same_weights(tmp_path / "run" / "policy", world / "model")
