"""Settings of the online methods on the embedded world: PPO, critic-free methods, online RRHF.

All draw as many responses as one round of offline ranking (four for each alignment prompt), in
rollouts of a hundred, and make two passes over each rollout, as offline ranking makes over its
candidates. The scores are brought to deviation 1 as they come, so that one KL coefficient means the
same for every reward model.

The settings were chosen on seeds 10 and 11, in about ten trainings. What mattered most was the KL
coefficient: at 0.2 PPO and RLOO stand still too early, at 0.1 online RRHF, which has no clip,
over-optimises. PPO's critic is made from a reward model that never saw an unfinished response, so
it knows nothing of them at first: it learns alone for two rollouts, and advantages do not rest on
its next value (`gae_lambda` 1).
"""

from __future__ import annotations

from typing import Any

from rrhf.errors import UserError
from rrhf.training.methods.objectives.rrhf import RRHFSettings
from rrhf.training.online.methods import METHODS
from rrhf.training.online.ppo_config import PPOConfig

SAMPLES_PER_PROMPT = 4
ROLLOUT_SIZE = 100
NUM_ROLLOUTS = {"full": 20, "smoke": 10}
MINIBATCH = {"responses": 25, "prompts": 5}
POINTS = 5
"""Policies kept along an online training, for its curve."""

EVERY_METHOD: dict[str, Any] = {
    "ppo_epochs": 2,
    "learning_rate": 5e-4,
    "warmup_ratio": 0.1,
    "min_learning_rate_ratio": 0.1,
    "normalize_reward": True,
    "clip_range_score": 5.0,
    "missing_eos_penalty": 1.0,
}
OF_METHOD: dict[str, dict[str, Any]] = {
    "ppo": {
        "kl_coeff": 0.1,
        "critic_learning_rate": 1e-3,
        "critic_warmup_ratio": 0.1,
        "critic_warmup_steps": 16,
        "vf_coeff": 0.1,
        "gae_lambda": 1.0,
    },
    "rloo": {"kl_coeff": 0.1},
    "grpo": {"kl_coeff": 0.1},
    "rrhf": {
        "kl_coeff": 0.2,
        "method_settings": RRHFSettings(rrhf_weight=0.1, sft_reduction="response"),
    },
}


def online_config(
    method: str, size: str, shared: dict[str, Any], files: dict[str, str], points: int = 0
) -> PPOConfig:
    """The settings of one method.

    Args:
        method: a key of `OF_METHOD`.
        size: of the world.
        shared: what every training of the study has in common, the run folder included.
        files: the policy to start from, prompts and reward model, under their settings' names.
        points: keep so many policies along the way, evenly spread; 0 = none.
    """
    if method not in OF_METHOD:
        raise UserError(f"method {method!r}: choose from {', '.join(OF_METHOD)}")
    record = METHODS[method]
    samples = SAMPLES_PER_PROMPT if record.needs_group else 1
    minibatch = MINIBATCH["prompts" if record.ranks else "responses"]
    steps = NUM_ROLLOUTS[size] * EVERY_METHOD["ppo_epochs"] * ROLLOUT_SIZE // minibatch
    if record.ranks:
        steps //= samples
    settings = {**shared, **files, **EVERY_METHOD, **OF_METHOD[method]}
    if points:
        settings["save_policy_steps"] = steps // points
    return PPOConfig(
        method=method,
        num_return_sequences=samples,
        rollout_size=ROLLOUT_SIZE,
        num_rollouts=NUM_ROLLOUTS[size],
        per_device_prompt_batch_size=ROLLOUT_SIZE // samples,
        per_device_train_batch_size=minibatch,
        **settings,
    )
