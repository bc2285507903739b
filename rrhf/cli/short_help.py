"""The content of each command's short help: the flags that people often change, and an example.

The table is indexed by the name of the configuration class. The help page adds the settings of a
registry choice, such as an objective, below these flags. A command that is not in the table has few
flags, and its help shows them all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """Which flags the help page of one command shows.

    Attributes:
        common: fields that people change, in the order in which they are shown.
        example: a command line that works; `{prog}` stands for the command.
    """

    common: tuple[str, ...]
    example: str


_OFFLINE = (
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "model_max_length",
)
_MACHINE = ("bf16", "use_lora", "resume_from_checkpoint")
_ENDPOINT = (
    *("base_url", "api_key_env", "send_prompts_to", "api", "dry_run", "max_requests", "max_cost"),
    *("input_token_price", "output_token_price", "concurrency"),
)
SETTINGS: dict[str, tuple[str, ...]] = {"OpenAIServerSettings": _ENDPOINT}
"""Settings of choices that have too many for the short help -> those that it shows."""
PAGES: dict[str, Page] = {
    "SFTConfig": Page(
        (*_OFFLINE, "eval_data_path", "eval_steps", *_MACHINE),
        "{prog} --model_name_or_path MODEL --data_path demonstrations.jsonl --output_dir runs/sft",
    ),
    "RewardConfig": Page(
        (*_OFFLINE, "validation_datasets", "validation_fraction", *_MACHINE),
        "{prog} --model_name_or_path runs/sft --data_path pairs.jsonl --output_dir runs/reward",
    ),
    "RankConfig": Page(
        (*_OFFLINE, "objective", "eval_data_path", *_MACHINE),
        "{prog} --model_name_or_path runs/sft --data_path scored.jsonl --output_dir runs/rank",
    ),
    "IterativeConfig": Page(
        (
            "num_rounds",
            "num_return_sequences",
            "max_new_tokens",
            "kl_coeff",
            "learning_rate",
            "num_train_epochs",
            "per_device_train_batch_size",
            "eval_datasets",
            "bf16",
            "resume_from_checkpoint",
        ),
        "{prog} --model_name_or_path runs/sft --reward_model_name_or_path runs/reward \\\n"
        "  --train_datasets prompts.jsonl --output_dir runs/rounds",
    ),
    "PPOConfig": Page(
        (
            "method",
            "learning_rate",
            "rollout_size",
            "num_return_sequences",
            "num_rollouts",
            "max_new_tokens",
            "kl_coeff",
            "per_device_train_batch_size",
            "bf16",
            "resume_from_checkpoint",
        ),
        "{prog} --model_name_or_path runs/sft --reward_model_name_or_path runs/reward \\\n"
        "  --train_datasets prompts.jsonl --output_dir runs/online",
    ),
    "GenerateConfig": Page(
        (
            "num_return_sequences",
            "max_new_tokens",
            "temperature",
            "top_p",
            "do_sample",
            "num_beams",
            "num_prompts",
            "per_device_prompt_batch_size",
            "chat_format",
            "bf16",
        ),
        "{prog} --model_name_or_path runs/sft --prompts prompts.jsonl --output_file samples.jsonl",
    ),
    "ScoreConfig": Page(
        (
            "reward_format",
            "reward_base",
            "reward_chat_format",
            "normalize",
            "max_length",
            "max_batch_tokens",
            "only_missing",
            "max_unscored_fraction",
            "attn_implementation",
            "bf16",
        ),
        "{prog} samples.jsonl scored.jsonl --scorer runs/reward",
    ),
    "ResponseGenConfig": Page(
        (
            "prompts",
            "diverse_beam",
            "num_return_sequences",
            "do_sample",
            "temperature",
            "max_new_tokens",
            "num_prompts",
            "per_device_prompt_batch_size",
            "reward_format",
            "bf16",
        ),
        "{prog} runs/sft runs/data --prompts prompts.jsonl --scorer runs/reward",
    ),
    "EvaluateConfig": Page(
        (
            "model_name_or_path",
            "scorer",
            "reference_model_name_or_path",
            "baseline",
            "name",
            "num_prompts",
            "samples_per_prompt",
            "decoding",
            "max_new_tokens",
            "bf16",
        ),
        "{prog} --model_name_or_path runs/rank --prompts heldout.jsonl --scorer runs/reward \\\n"
        "  --reference_model_name_or_path runs/sft --baseline runs/sft --output_dir rows",
    ),
    "StartVLLMConfig": Page(
        (
            "python",
            "port",
            "dtype",
            "max_model_len",
            "gpu_memory_utilization",
            "cpu_cache_gib",
            "served_folder",
            "dry_run",
        ),
        "{prog} runs/sft --python vllm-env/bin/python",
    ),
    "ServeRewardConfig": Page(
        (
            "host",
            "port",
            "token_env",
            "max_request_megabytes",
            "reward_format",
            "reward_chat_format",
            "normalize",
            "max_length",
            "max_batch_tokens",
            "bf16",
        ),
        "{prog} runs/reward",
    ),
    "EvaluateRewardConfig": Page(
        (
            "names",
            "baseline",
            "num_prompts",
            "calibration_bins",
            "confidence",
            "split",
            "max_length",
            "max_batch_tokens",
            "max_unscored_fraction",
            "bf16",
        ),
        "{prog} --scorers runs/reward-1 runs/reward-2 \\\n"
        "  --data_path ranked.jsonl --output_dir rows",
    ),
}
