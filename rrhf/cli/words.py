"""Words that people type, and what they mean here: short names of flags, names of methods.

A word means a flag only where one flag of the command can be meant; where several can, all are
named and nothing is guessed (`--batch_size` of `rrhf train ppo`). What exists nowhere here is in
`rrhf.cli.elsewhere`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rrhf.cli.fields import Flag, normalise
from rrhf.training.methods.objectives import OBJECTIVES
from rrhf.training.online.methods import METHODS

_DATA = ("data_path", "train_datasets", "prompts", "input_file")
_BATCH = (
    "per_device_train_batch_size",
    "per_device_prompt_batch_size",
    "per_device_eval_batch_size",
    "rollout_size",
)
_MICRO_BATCH = ("per_device_train_batch_size", "per_device_eval_batch_size")
_MODEL = ("model_name_or_path",)
_REWARD_MODEL = ("reward_model_name_or_path", "scorer")
_OUTPUT = ("output_dir", "output_file", "output")

SHORT_NAMES: dict[str, tuple[str, ...]] = {
    # model and data
    "model": _MODEL,
    "model_name": _MODEL,
    "model_path": _MODEL,
    "model_id": _MODEL,
    "base_model": _MODEL,
    "policy_model": _MODEL,
    "pretrain": _MODEL,
    "sft_model_path": _MODEL,
    "sft_experiment_dir": _MODEL,
    "reward_model": _REWARD_MODEL,
    "reward_model_path": _REWARD_MODEL,
    "reward_pretrain": _REWARD_MODEL,
    "rm_experiment_dir": _REWARD_MODEL,
    "ref_model": ("reference_model_name_or_path",),
    "reference_model": ("reference_model_name_or_path",),
    "data": _DATA,
    "data_dir": _DATA,
    "dataset": _DATA,
    "dataset_name": _DATA,
    "dataset_path": _DATA,
    "train_data": _DATA,
    "train_file": _DATA,
    "train_dataset": _DATA,
    "prompt_data": ("train_datasets", "prompts"),
    "eval_data": ("eval_data_path", "eval_datasets", "validation_datasets"),
    "eval_dataset": ("eval_data_path", "eval_datasets", "validation_datasets"),
    "eval_file": ("eval_data_path", "eval_datasets", "validation_datasets"),
    "output": _OUTPUT,
    "output_path": _OUTPUT,
    "out": _OUTPUT,
    "out_dir": _OUTPUT,
    "save_path": _OUTPUT,
    "save_dir": _OUTPUT,
    # optimisation
    "lr": ("learning_rate",),
    "actor_lr": ("learning_rate",),
    "critic_lr": ("critic_learning_rate",),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "max_epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "num_steps": ("max_steps",),
    "num_train_steps": ("max_steps",),
    "batch_size": _BATCH,
    "micro_batch_size": _MICRO_BATCH,
    "micro_train_batch_size": _MICRO_BATCH,
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_accum_steps": ("gradient_accumulation_steps",),
    "grad_acc_steps": ("gradient_accumulation_steps",),
    "gradient_accumulation": ("gradient_accumulation_steps",),
    "accumulation_steps": ("gradient_accumulation_steps",),
    "lr_scheduler": ("lr_scheduler_type",),
    "scheduler": ("lr_scheduler_type",),
    "lr_warmup_ratio": ("warmup_ratio",),
    "wd": ("weight_decay",),
    "grad_clip": ("max_grad_norm",),
    "gradient_clip_val": ("max_grad_norm",),
    "max_norm": ("max_grad_norm",),
    "max_len": ("model_max_length", "max_length"),
    "max_seq_len": ("model_max_length", "max_length"),
    "seq_len": ("model_max_length", "max_length"),
    "cutoff_len": ("model_max_length", "max_length"),
    # machine
    "use_peft": ("use_lora",),
    "lora": ("use_lora",),
    "lora_rank": ("lora_r",),
    "lora_targets": ("lora_target_modules",),
    "resume": ("resume_from_checkpoint",),
    "save_interval": ("save_steps",),
    "save_freq": ("save_steps",),
    "eval_interval": ("eval_steps",),
    "eval_freq": ("eval_steps",),
    "log_interval": ("logging_steps",),
    "logger": ("report_to",),
    # responses and online training
    "num_generations": ("num_return_sequences",),
    "n_samples_per_prompt": ("num_return_sequences", "samples_per_prompt"),
    "max_completion_length": ("max_new_tokens",),
    "max_response_length": ("max_new_tokens", "max_response_tokens"),
    "response_length": ("max_new_tokens",),
    "max_prompt_length": ("max_prompt_tokens",),
    "algorithm": ("method",),
    "algo": ("method",),
    "adv_estimator": ("method",),
    "kl_coef": ("kl_coeff",),
    "init_kl_coef": ("kl_coeff",),
    "cliprange": ("clip_range_ratio",),
    "clip_eps": ("clip_range_ratio",),
    "eps_clip": ("clip_range_ratio",),
    "cliprange_value": ("clip_range_value",),
    "value_clip": ("clip_range_value",),
    "vf_coef": ("vf_coeff",),
    "entropy_coef": ("entropy_coeff",),
    "lam": ("gae_lambda",),
    "lambd": ("gae_lambda",),
    "num_ppo_epochs": ("ppo_epochs",),
}
"""A word -> the flags that it may mean, of which a command has none, one or several."""


def meanings(word: str, flags: Mapping[str, Flag]) -> list[Flag]:
    """The flags of a command that a short name may mean, in the order of the table."""
    return [flags[name] for name in SHORT_NAMES.get(word, ()) if name in flags]


def spelt_out(flags: Mapping[str, Flag], names: Mapping[str, Flag]) -> dict[str, Flag]:
    """`names` with the short names that mean one flag of the command.

    Args:
        flags: of the command.
        names: what is accepted already; it goes before the table.
    """
    found = dict(names)
    for word in SHORT_NAMES:
        meant = meanings(word, flags)
        if word not in found and len(meant) == 1:
            found[word] = meant[0]
    return found


_DR_GRPO, _REINFORCE_PP = {"method": "dr_grpo"}, {"method": "reinforce_pp"}

STAGE_WORDS: dict[str, tuple[str, Mapping[str, Any]]] = {
    **{name: ("rank", {"objective": name}) for name in OBJECTIVES},
    **{name: ("ppo", {"method": name}) for name in METHODS if name not in ("ppo", "rrhf")},
    "drgrpo": ("ppo", _DR_GRPO),
    "reinforce++": ("ppo", _REINFORCE_PP),
    "reinforce_plus_plus": ("ppo", _REINFORCE_PP),
    "online_rrhf": ("ppo", {"method": "rrhf"}),
    "rrhf": ("rank", {}),
    "rm": ("reward", {}),
    "reward_model": ("reward", {}),
}
"""Another name of a stage of `rrhf train` -> the stage, and the settings that go with the name."""


def stage_meant(word: str, stages: Sequence[str]) -> tuple[str, Mapping[str, Any]] | None:
    """The stage that a word names, with the settings that follow from it; None for no stage."""
    if word in stages:
        return word, {}
    word = normalise(word).lower()
    return (word, {}) if word in stages else STAGE_WORDS.get(word)


COMMAND_WORDS: dict[str, tuple[str, ...]] = {
    "eval": ("evaluate",),
    "gen": ("generate",),
    "validate": ("data", "validate"),
    "stats": ("data", "stats"),
    "convert": ("data", "convert"),
}
"""Another name of a command -> the command; names of stages work without `train` too."""
