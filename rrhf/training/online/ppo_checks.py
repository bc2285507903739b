"""Checks the settings of `rrhf train ppo` before anything is loaded."""

from __future__ import annotations

from dataclasses import fields

from rrhf.algorithms.names import KL_LOSS_ESTIMATORS
from rrhf.errors import UserError
from rrhf.generation.params import FILTERS
from rrhf.scoring.build import is_made
from rrhf.training.online.methods import METHODS
from rrhf.training.online.ppo_settings import PPOSettings

EVALUATION_MEASURES = ("score", "reward", "kl", "kl_k3", "finished_fraction", "response_length")
"""The metrics of an evaluation during training; logged as eval_<name>."""

_OF_ADVANTAGES = (
    "gamma",
    "gae_lambda",
    "normalize_advantage",
    "clip_range_ratio",
    "clip_range_ratio_high",
    "dual_clip",
    "entropy_coeff",
    "loss_reduction",
    "target_kl",
)
"""Settings that have no effect on a method that ranks."""


def check_combinations(config: PPOSettings) -> None:
    """Check for settings that exclude each other, or have no effect without another setting.

    Raises:
        UserError: there are such settings.
    """
    if config.dual_clip and not config.dual_clip > 1:
        raise UserError(f"--dual_clip {config.dual_clip}: must be above 1, or 0 for none")
    if config.max_new_tokens >= config.model_max_length:
        raise UserError(
            f"--max_new_tokens {config.max_new_tokens}: must be below --model_max_length "
            f"{config.model_max_length}, so that a prompt fits too"
        )
    if config.rollout_size % config.num_return_sequences and not config.refresh_steps:
        raise UserError(
            f"--rollout_size {config.rollout_size}: must be a multiple of --num_return_sequences "
            f"{config.num_return_sequences}, so that each prompt has all its responses"
        )
    if config.engine != "local":
        check_engine(config)
    method = METHODS[config.method]
    chosen = f"--method {config.method}"
    if config.ranking is not None and config.ranking is config.method_settings:
        chosen += f" --objective {config.ranking.objective}"
    if config.num_return_sequences < 2 and config.compares_responses:
        raise UserError(
            f"{chosen} compares the responses to a prompt; set "
            "--num_return_sequences to 2 or more (4 is usual)"
        )
    if config.refresh_steps:
        check_refresh(config)
    if config.kl_in == "loss":
        if method.ranks:
            raise UserError(
                f"--kl_in loss: with {chosen} the KL is part of the rewards only; leave it out"
            )
        if config.kl_estimator not in ("auto", *KL_LOSS_ESTIMATORS):
            raise UserError(
                f"--kl_estimator {config.kl_estimator}: its gradient is useless in a loss; choose "
                f"one of {', '.join(KL_LOSS_ESTIMATORS)}"
            )
    if config.best_metric.removeprefix("eval_") not in EVALUATION_MEASURES:
        raise UserError(
            f"--metric_for_best_model {config.best_metric}: not a metric of the evaluations; "
            f"choose one of {', '.join(EVALUATION_MEASURES)}"
        )
    if config.max_steps > 0 and config.num_rollouts > 0:
        raise UserError("--max_steps and --num_rollouts both say when to end; use only one of them")
    if (config.ptx_coeff > 0) != (config.ptx_datasets is not None):
        raise UserError(
            f"--ptx_coeff {config.ptx_coeff} and --ptx_datasets {config.ptx_datasets}: neither "
            "has an effect without the other; set both or neither"
        )
    if config.ptx_datasets and method.ranks:
        raise UserError(f"--ptx_datasets: {chosen} trains on its own responses only; leave it out")
    if method.ranks:
        defaults = {item.name: item.default for item in fields(config)}
        for name in _OF_ADVANTAGES:
            if getattr(config, name) != defaults[name]:
                raise UserError(
                    f"--{name} {getattr(config, name)}: {chosen} uses no advantages, so this has "
                    "no effect; leave it out"
                )
    if config.lora_dropout:
        raise UserError(
            f"--lora_dropout {config.lora_dropout}: with dropout, the policy that is updated would "
            "differ from the policy that sampled; leave out --lora_dropout"
        )
    if config.group_by_length:
        raise UserError("--group_by_length: a rollout is shuffled as a whole; leave it out")
    scorer = config.reward_model_name_or_path
    starts_from = config.reward_critic_model_name_or_path or not is_made(scorer)
    if config.has_critic and not config.share_trunk and not starts_from:
        raise UserError(
            f"--reward_model_name_or_path {scorer}: not a model that a critic could start from; "
            "add --reward_critic_model_name_or_path or --share_trunk, or choose a --method "
            "without a critic"
        )
    if config.share_trunk and config.reward_critic_model_name_or_path:
        raise UserError(
            "--share_trunk puts the critic on the policy; leave out "
            "--reward_critic_model_name_or_path"
        )
    if config.detach_value_trunk and not config.share_trunk:
        raise UserError("--detach_value_trunk: acts only with --share_trunk; leave it out")
    if not config.has_critic:
        for name in ("share_trunk", "reward_critic_model_name_or_path", "critic_warmup_steps"):
            if getattr(config, name):
                raise UserError(f"--{name}: --method {config.method} has no critic; leave it out")
    if not config.refresh_steps:
        check_horizon(config, config.rollout_size)


def check_engine(config: PPOSettings) -> None:
    """Check the settings against an engine in another process.

    Raises:
        UserError: the settings filter tokens.
    """
    for name in FILTERS:
        if getattr(config, name) != FILTERS[name]:
            raise UserError(
                f"--{name} {getattr(config, name)}: with --engine {config.engine}, responses must "
                "come from the unfiltered policy, because its log-probs are compared with the "
                "engine's; leave it out"
            )


def check_horizon(config: PPOSettings, responses: int) -> None:
    """Check that adaptive_kl can adjust the coefficient after rollouts of this many responses.

    Raises:
        UserError: adaptive_kl cannot adjust the coefficient.
    """
    if config.adaptive_kl and not (
        config.kl_coeff and config.kl_target > 0 and config.kl_horizon > 0.2 * responses
    ):
        raise UserError(
            "--adaptive_kl: needs --kl_coeff and --kl_target above 0, and --kl_horizon above a "
            f"fifth of the rollout ({0.2 * responses:g})"
        )


def check_refresh(config: PPOSettings) -> None:
    """Check that the optimiser steps of `refresh_steps` make whole passes over a rollout.

    Raises:
        UserError: the passes are not whole, or `rollout_size` is given too.
    """
    default = next(item.default for item in fields(config) if item.name == "rollout_size")
    if config.rollout_size != default:
        raise UserError(
            f"--refresh_steps {config.refresh_steps} and --rollout_size {config.rollout_size}: "
            "each says how much is sampled at once; use only one"
        )
    if config.refresh_steps % config.ppo_epochs:
        raise UserError(
            f"--refresh_steps {config.refresh_steps}: must be a multiple of --ppo_epochs "
            f"{config.ppo_epochs}, so that every response is used equally often"
        )
