#!/usr/bin/env bash
# A whole study on a real model and real preferences, on a CPU: split, reward model, candidates,
# RRHF offline and online, PPO, evaluation, report. Every step is a command that a user has; steps that are done are passed
# over, and one that was stopped goes on, so the same call may be repeated.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash paper/real_run.sh MODEL PAIRS OUT

  MODEL   folder of the policy to align (`rrhf fetch smollm2 MODEL` makes one)
  PAIRS   preference pairs as HH-RLHF has them, such as harmless-base/test.jsonl.gz
  OUT     gets everything; the report is OUT/real_run.md
TEXT
}

if (($# != 3)) || [[ $1 == -* ]]; then
    usage >&2
    exit 2
fi
model=$1 pairs=$2 out=$3
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p -- "$out/steps"

# step NAME COMMAND...: run once; command and seconds are kept for the report.
step() {
    local name=$1 started code=0 before=0
    shift
    if [[ -e $out/steps/$name.seconds ]]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $*"
    printf '%q ' "$@" >"$out/steps/$name.command"
    # A step that was stopped and goes on counts all its parts.
    [[ ! -e $out/steps/$name.partial ]] || before=$(<"$out/steps/$name.partial")
    started=$SECONDS
    "$@" || code=$?
    if ((code)); then
        echo $((before + SECONDS - started)) >"$out/steps/$name.partial"
        exit "$code"
    fi
    echo $((before + SECONDS - started)) >"$out/steps/$name.seconds"
}

resume() {
    [[ ! -e $1/settings.json && ! -e $1/config.json ]] || printf '%s' --resume_from_checkpoint
}

step 1-split rrhf data convert "$pairs" "$out/data" \
    --parts '{reward: 0.6, policy: 0.15, heldout: 0.25}'

# shellcheck disable=SC2046  # no word, or one
step 2-reward rrhf train reward --model_name_or_path "$model" --output_dir "$out/reward" \
    --data_path "$out/data/reward.jsonl" --validation_datasets "$out/data/heldout.jsonl" \
    --model_max_length 256 --num_train_epochs 1 --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 --learning_rate 5e-5 --warmup_ratio 0.05 \
    --regularization 0.001 --bf16 --group_by_length --save_steps 10 $(resume "$out/reward")

step 3-candidates bash "$here/data_generation/response_gen.sh" "$model" "$out/candidates" \
    --prompts "$out/data/policy.jsonl" --num_prompts 200 --num_return_sequences 4 \
    --do_sample true --max_new_tokens 96 --max_prompt_tokens 160 \
    --per_device_prompt_batch_size 8 --bf16 --scorer "$out/reward/reward_model"

# shellcheck disable=SC2046
step 4-rrhf bash "$here/train.sh" "$model" "$out/rrhf" "$out/candidates/train_data.json" \
    --model_max_length 256 --max_response_tokens 96 --num_train_epochs 2 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 2e-5 \
    --sft_reduction response --bf16 --group_by_length --save_steps 10 $(resume "$out/rrhf")

evaluate() {
    local name=$1
    shift
    step "$name" rrhf evaluate --prompts "$out/data/heldout.jsonl" --num_prompts 120 \
        --output_dir "$out/rows" --scorer "$out/reward/reward_model" \
        --max_new_tokens 96 --max_prompt_tokens 160 --bf16 "$@"
}
reference=(--reference_model_name_or_path "$model")
against=(--baseline "$out/rows/opponent.samples.jsonl")

# Win rates are against samples of the base of their own seed.
evaluate 5-opponent --model_name_or_path "$model" --name opponent --decoding sample --seed 7
evaluate 6-base --model_name_or_path "$model" --name base "${reference[@]}" "${against[@]}"
evaluate 7-best-of-4 --model_name_or_path "$model" --name "base best of 4" --best_of_n 4 \
    --decoding sample "${reference[@]}" "${against[@]}"
evaluate 8-rrhf-rows --model_name_or_path "$out/rrhf/policy" --name RRHF \
    "${reference[@]}" "${against[@]}"
evaluate 9-chosen --responses dataset --response_source human:chosen --name "data: chosen" \
    "${reference[@]}" "${against[@]}"
evaluate 9-rejected --responses dataset --response_source human:rejected --name "data: rejected" \
    "${reference[@]}" "${against[@]}"

# One sample a prompt says little of a reward that varies so much from sample to sample.
evaluate 10-base-of-4-samples --model_name_or_path "$model" --name "base, 4 samples" \
    --decoding sample --samples_per_prompt 4 --seed 11 "${against[@]}"
evaluate 11-rrhf-of-4-samples --model_name_or_path "$out/rrhf/policy" --name "RRHF, 4 samples" \
    --decoding sample --samples_per_prompt 4 --seed 11 "${against[@]}"

# Online methods: the prompts, the number of sampled responses, their length and the reward model
# of the offline study; one pass over what the policy itself has just written.
online() {
    local name=$1 folder=$2
    shift 2
    # shellcheck disable=SC2046
    step "$name" rrhf train ppo --model_name_or_path "$model" --output_dir "$out/$folder" \
        --reward_model_name_or_path "$out/reward/reward_model" \
        --train_datasets "$out/candidates/train_data.json" \
        --model_max_length 256 --max_new_tokens 96 --num_return_sequences 4 \
        --rollout_size 160 --num_rollouts 5 --bf16 --save_steps 10 "$@" $(resume "$out/$folder")
}
online 12-online-rrhf online_rrhf --method rrhf --per_device_prompt_batch_size 10 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 2e-5 \
    --sft_reduction response
online 13-ppo-lora ppo_lora --use_lora --share_trunk --per_device_prompt_batch_size 4 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 2e-4 \
    --critic_learning_rate 1e-3
online 14-ppo ppo --per_device_prompt_batch_size 4 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 2e-5 \
    --critic_learning_rate 2e-5

number=15
evaluate_online() {
    local folder=$1 name=$2
    evaluate $((number++))-"$folder"-rows --model_name_or_path "$out/$folder/policy" \
        --name "$name" "${reference[@]}" "${against[@]}"
    evaluate $((number++))-"$folder"-of-4-samples --model_name_or_path "$out/$folder/policy" \
        --name "$name, 4 samples" --decoding sample --samples_per_prompt 4 --seed 11 \
        "${against[@]}"
}
evaluate_online online_rrhf "online RRHF"
evaluate_online ppo_lora "PPO LoRA"
evaluate_online ppo "PPO"

python "$here/paper/real_run_report.py" "$out"
echo "Report: $out/real_run.md"
