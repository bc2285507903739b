"""The PPO trainer: whole runs of a tiny model, what they must reach and what must not move."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import (
    build_world,
    save_demonstrations,
    save_prompts,
    save_reward_model,
    settings,
    without_clock,
)
from safetensors.torch import load_file
from step_cases import stopped_after
from trainer_cases import metrics_of, same_weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rrhf.cli import main as cli
from rrhf.data.collate import EncodedSet, collate
from rrhf.errors import StoppedBySignal, UserError
from rrhf.models.forward.logprobs import Policy
from rrhf.sealed_folders import seal_folder
from rrhf.training.methods.objectives.rrhf import RRHFSettings
from rrhf.training.online import ppo

BANDIT: dict[str, Any] = {
    "reward_model_name_or_path": "function:ppo_cases:has_e",
    "rollout_size": 64,
    "num_rollouts": 20,
    "ppo_epochs": 1,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "per_device_prompt_batch_size": 64,
    "max_new_tokens": 3,
    "learning_rate": 1e-2,
    "kl_coeff": 0.0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def rows_of(run: Path) -> list[dict[str, float]]:
    """Metrics without what a clock or the memory says."""
    return [without_clock(row) for row in metrics_of(run)]


def steps_of(run: Path) -> list[dict[str, float]]:
    """The rows of optimiser steps."""
    return [row for row in rows_of(run) if "loss" in row]


def rollouts_of(run: Path) -> list[dict[str, float]]:
    """The rows of rollouts."""
    return [row for row in rows_of(run) if "score" in row]


def test_at_the_first_step_the_ratio_is_one_and_the_kl_zero(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        ppo.train(settings(world, tmp_path / "run", temperature=0.7))
    # With the temperature dropped on one side the two would differ, and that would be said.
    assert "computed again" not in caplog.text
    rollouts = rollouts_of(tmp_path / "run")
    first, *_, last = steps_of(tmp_path / "run")
    assert first["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert first["largest_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert rollouts[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(last["largest_ratio"] - 1) > 1e-3  # and only there
    assert rollouts[1]["kl"] > 1e-3
    assert [(row["step"], row["rollout"]) for row in rollouts] == [(0, 0), (4, 1)]
    assert [row["rollout"] for row in steps_of(tmp_path / "run")] == [0, 0, 0, 0, 1, 1, 1, 1]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "value")
    for model, start in ((policy, "model"), (value, "reward")):
        saved = load_file(world / start / "model.safetensors")
        moved = {n: p for n, p in model.state_dict().items() if n in saved}
        assert any(not torch.equal(p, saved[n]) for n, p in moved.items())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"]["responses"]["sampled"] == 24


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "ppo", "share_trunk": True},
        {"method": "rloo", "num_return_sequences": 4},
        {"method": "gopo", "num_return_sequences": 4},
        {
            "method": "rrhf",
            "num_return_sequences": 4,
            "per_device_train_batch_size": 8,
            "method_settings": RRHFSettings(sft_reduction="response"),
        },
    ],
    ids=lambda changes: changes["method"],
)
def test_a_bandit_is_solved(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The best mean score is 1; chance is below a half."""
    ppo.train(settings(world, tmp_path / "run", **BANDIT | changes))
    rows = rollouts_of(tmp_path / "run")
    assert rows[0]["score"] < 0.5
    assert rows[-1]["score"] > 0.9


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_a_very_large_kl_coefficient_holds_the_policy(
    world: Path, tmp_path: Path, kl_in: str
) -> None:
    """The same run with a coefficient of zero goes on and on; what is left is the steps' noise."""
    shared = BANDIT | {"method": "rloo", "num_return_sequences": 4, "num_rollouts": 15}
    last = {}
    for name, coefficient in (("free", 0.0), ("held", 100.0)):
        changes = {"kl_coeff": coefficient, "kl_in": kl_in, "learning_rate": 1e-3}
        ppo.train(settings(world, tmp_path / name, **shared | changes))
        last[name] = [row["kl_k3"] for row in rollouts_of(tmp_path / name)[-8:]]
    assert min(last["free"]) > 1.0
    assert max(last["held"]) < 0.25


def test_without_any_score_nothing_moves(world: Path, tmp_path: Path) -> None:
    """Rewards and values are zero, so are all advantages: not a bit of the policy may change."""
    changes = {"reward_model_name_or_path": "function:ppo_cases:nothing", "share_trunk": True}
    ppo.train(settings(world, tmp_path / "run", **BANDIT | changes | {"num_rollouts": 2}))
    assert same_weights(world / "model", tmp_path / "run" / "policy")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalize_reward": True, "adaptive_kl": True, "kl_horizon": 50.0, "kl_target": 0.1},
        {"method": "rrhf", "num_return_sequences": 2, "per_device_train_batch_size": 2},
        {"ptx": True, "share_trunk": True, "use_ema": True, "ema_beta": 0.9},
        {"ptx": True, "share_trunk": True, "use_ema": True, "as_0.1": True},
    ],
    ids=["ppo", "rrhf", "ptx_ema", "ptx_ema_of_version_0.1"],
)
def test_resumed_equals_straight(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Stopped by SIGTERM within the passes over the second rollout; every bit is the same."""
    changes = dict(changes)
    is_old = changes.pop("as_0.1", False)
    if changes.pop("ptx", None):
        changes |= with_demonstrations(tmp_path)
    ppo.train(settings(world, tmp_path / "straight", **changes))
    steps = len(steps_of(tmp_path / "straight"))
    stop_at = steps // 2 + 1
    with stopped_after(stop_at), pytest.raises(StoppedBySignal):
        ppo.train(settings(world, tmp_path / "resumed", **changes))
    checkpoint = tmp_path / "resumed" / "checkpoints" / f"step-{stop_at}"
    assert (checkpoint / "stream.safetensors").exists()
    if is_old:
        rewrite_as_version_0_1(checkpoint)
    ppo.train(settings(world, tmp_path / "resumed", resume_from_checkpoint=True, **changes))
    assert same_weights(tmp_path / "straight" / "policy", tmp_path / "resumed" / "policy")
    if "method" not in changes:
        assert same_weights(tmp_path / "straight" / "value", tmp_path / "resumed" / "value")
    if "use_ema" in changes:
        averages = (tmp_path / name / "policy_ema" for name in ("straight", "resumed"))
        assert same_weights(*averages)
    assert rows_of(tmp_path / "straight") == rows_of(tmp_path / "resumed")
    tables = (tmp_path / name / "samples.jsonl" for name in ("straight", "resumed"))
    assert len({table.read_bytes() for table in tables}) == 1
    one, two = (
        json.loads((tmp_path / name / "manifest.json").read_text())
        for name in ("straight", "resumed")
    )
    for key in ("kl_coefficient", "score_normalizer", "data"):
        assert one[key] == two[key]
    if "adaptive_kl" in changes:
        assert one["kl_coefficient"] != 0.05 and one["score_normalizer"]["count"] == 24


def rewrite_as_version_0_1(checkpoint: Path) -> None:
    """Version 0.1 kept the table of samples next to its stream, and the rest within it."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    hooks = state.pop("hooks")
    state["samples"] = hooks.pop("samples")
    state["stream"] |= hooks | {"signs": {**hooks["signs"], "rollouts": 2}}
    path.write_text(json.dumps(state))
    seal_folder(checkpoint)


def test_under_bf16_old_log_probs_are_the_trainers_and_it_is_said_once(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        ppo.train(settings(world, tmp_path / "run", bf16=True))
    assert caplog.text.count("computed again by the trainer's own forward") == 1
    first = steps_of(tmp_path / "run")[0]
    # The batches differ in their padding, which moves a bfloat16 logit of 4 by up to 2^-7.
    assert first["ratio"] == pytest.approx(1.0, abs=0.01)
    assert first["largest_ratio"] == pytest.approx(1.0, abs=0.1)


def with_demonstrations(folder: Path) -> dict[str, Any]:
    return {"ptx_datasets": str(save_demonstrations(folder)), "ptx_coeff": 0.5}


def test_demonstrations_keep_the_policy_a_language_model(world: Path, tmp_path: Path) -> None:
    """Without any score they are all that moves it; their loss enters with its weight."""
    changes = BANDIT | with_demonstrations(tmp_path)
    changes |= {"reward_model_name_or_path": "function:ppo_cases:nothing", "share_trunk": True}
    ppo.train(settings(world, tmp_path / "run", **changes))
    rows = steps_of(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(
        rows[0]["policy_loss"] + 0.1 * rows[0]["value_loss"] + 0.5 * rows[0]["ptx_loss"], rel=1e-5
    )
    assert rows[-1]["ptx_loss"] < rows[0]["ptx_loss"] - 1.0


def test_the_average_follows_the_policy(world: Path, tmp_path: Path) -> None:
    """After one step half of either; and the policy itself is what it is without an average."""
    one_step = {"num_rollouts": -1, "max_steps": 1, "warmup_ratio": 0.0}
    ppo.train(settings(world, tmp_path / "plain", **one_step))
    ppo.train(settings(world, tmp_path / "run", use_ema=True, ema_beta=0.5, **one_step))
    assert same_weights(tmp_path / "plain" / "policy", tmp_path / "run" / "policy")
    start, end, average = (
        load_file(folder / "model.safetensors")
        for folder in (world / "model", tmp_path / "run" / "policy", tmp_path / "run/policy_ema")
    )
    for name, value in average.items():
        torch.testing.assert_close(value, (start[name] + end[name]) / 2)
    assert any(not torch.equal(start[name], end[name]) for name in end)


def test_the_critic_can_learn_alone_first(world: Path, tmp_path: Path) -> None:
    ppo.train(settings(world, tmp_path / "run", critic_warmup_steps=8, weight_decay=0.1))
    assert same_weights(world / "model", tmp_path / "run" / "policy")
    saved = load_file(world / "reward" / "model.safetensors")
    value = load_file(tmp_path / "run" / "value" / "model.safetensors")
    assert any(not torch.equal(value[name], saved[name]) for name in saved)
    # Nor may the policy's gradient enter the common norm, or the optimiser's memory of it.
    for row in steps_of(tmp_path / "run"):
        assert row["loss"] == pytest.approx(0.1 * row["value_loss"], rel=1e-6)


def test_an_update_that_goes_far_ends_its_rollout(world: Path, tmp_path: Path) -> None:
    changes = {"target_kl": 1e-4, "learning_rate": 1e-2, "ppo_epochs": 4}
    ppo.train(settings(world, tmp_path / "run", **changes))
    rollouts = [row["rollout"] for row in steps_of(tmp_path / "run")]
    assert set(rollouts) == {0, 1} and len(rollouts) < 16


def test_adapters_train_with_themselves_off_as_reference(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ppo.train(
        settings(
            world,
            tmp_path / "run",
            use_lora=True,
            lora_r=2,
            eval_steps=4,
            eval_datasets=str(world / "prompts.jsonl"),
        )
    )
    rows = rows_of(tmp_path / "run")
    rollouts = rollouts_of(tmp_path / "run")
    assert rollouts[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert rollouts[-1]["kl"] > 1e-5 or rows[-1]["eval_kl"] > 1e-5
    assert {"eval_score", "eval_kl", "eval_response_length"} <= rows[-1].keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    batch = collate([EncodedSet([5, 6], [[7, 8]])], 2)
    start = AutoModelForCausalLM.from_pretrained(world / "model")
    assert not torch.equal(Policy(model)(batch).logprobs, Policy(start)(batch).logprobs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reward_model_name_or_path": "function:ppo_cases:has_e", "share_trunk": False},
            "a critic could start from",
        ),
        ({"method": "rloo", "num_return_sequences": 1}, "num_return_sequences to 2 or more"),
        ({"rollout_size": 13, "num_return_sequences": 2}, "must be a multiple"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"max_new_tokens": 100}, "so that a prompt fits too"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "useless in a loss"),
        ({"method": "grpo", "num_return_sequences": 2, "share_trunk": True}, "has no critic"),
        ({"ptx_coeff": 1.0}, "without the other"),
        ({"lora_dropout": 0.1}, "with dropout"),
        ({"max_steps": 3}, "both say when to end"),
        ({"adaptive_kl": True, "kl_target": 0.0}, "kl_target above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ppo.train(settings(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "policy").exists()


def test_a_critic_with_another_vocabulary_is_refused(world: Path, tmp_path: Path) -> None:
    other = save_reward_model(tmp_path / "other", vocab_size=300)
    with pytest.raises(UserError, match="share the policy's vocabulary"):
        ppo.train(settings(world, tmp_path / "run", reward_critic_model_name_or_path=str(other)))
    ppo.train(  # as a mere scorer it may have any tokenizer
        settings(
            world,
            tmp_path / "run",
            reward_model_name_or_path=str(other),
            share_trunk=True,
            num_rollouts=1,
        )
    )


def test_a_language_model_is_no_reward_model(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a reward model"):
        ppo.train(settings(world, tmp_path / "run", reward_model_name_or_path=str(world / "model")))


def test_prompts_that_leave_no_room_are_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError):
        ppo.train(settings(world, tmp_path / "run", train_datasets=str(tmp_path / "empty.jsonl")))
    tight = {"chat_format": "alpaca", "model_max_length": 8}
    prompts = save_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(UserError, match="no prompt is left of 6"):
        ppo.train(settings(world, tmp_path / "run", train_datasets=str(prompts), **tight))


def test_the_command_takes_the_flags_that_users_know(world: Path, tmp_path: Path) -> None:
    words = "train ppo --num_return_sequences 2 --rollout_size 4 --rollout_mini_batch_size 2"
    words += " --update_iters 1 --max_dec_len 4 --temperature 0.7 --init_kl_coeff 0.02"
    words += " --clip_range_score 5 --normalize_rewards --normalize_advantages true"
    words += " --clip_range_ratio 0.2 --clip_range_value 5 --actor_learning_rate 1e-4"
    words += " --critic_learning_rate 1e-4 --critic_weight_decay 0.1 --max_steps 1"
    words += " --critic_lr_scheduler_type linear --critic_warmup_ratio 0.1 --max_length 64"
    words += f" --model_name_or_path {world / 'model'} --output_dir {tmp_path / 'run'}"
    words += f" --reward_model_name_or_path {world / 'reward'}"
    words += f" --train_datasets {world / 'prompts.jsonl'}"
    assert cli.main(words.split()) == 0
    assert (tmp_path / "run" / "policy" / "config.json").is_file()


def test_filters_are_warned_of(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        settings(world, "unused", top_p=0.9)
    assert "--top_p 0.9" in caplog.text and "biased" in caplog.text


def test_with_two_trunks_a_very_large_kl_coefficient_holds_the_policy(
    world: Path, tmp_path: Path
) -> None:
    """The critic has a trunk of its own, so nothing but the policy's own loss moves the policy."""
    shared = BANDIT | {"reward_critic_model_name_or_path": str(world / "reward")}
    shared |= {"learning_rate": 1e-3, "num_rollouts": 15}
    last = {}
    for name, coefficient in (("free", 0.0), ("held", 100.0)):
        ppo.train(settings(world, tmp_path / name, **shared | {"kl_coeff": coefficient}))
        last[name] = [row["kl_k3"] for row in rollouts_of(tmp_path / name)[-6:]]
    assert min(last["free"]) > 4 * max(last["held"])
