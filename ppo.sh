#!/usr/bin/env bash
# Train a policy on its own responses (PPO, critic-free methods, online RRHF): finds the
# devices, chooses the launch, hands over to `rrhf train ppo`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=configs/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/configs/launch.sh"

usage() {
    cat <<'TEXT'
usage: bash ppo.sh MODEL REWARD OUT PROMPTS [--launch NAME] [--num_processes N] [flags of `rrhf train ppo`]

  MODEL    folder or hub name of the policy to start from
  REWARD   reward model, which the critic starts from too; or a scorer such as function:module:name
  OUT      run folder: checkpoints, metrics, and the trained models in OUT/policy and OUT/value
  PROMPTS  files of prompts

TEXT
    launch_help
    # shellcheck disable=SC2016 # the marks are the text's
    echo '`rrhf train ppo --help all` lists the flags; --method rloo, grpo, reinforce_pp or rrhf needs no critic.'
}

require_words 4 "MODEL, REWARD, OUT and PROMPTS" "$@"
take_launch_flags "${@:5}"
hand_over Training train ppo --model_name_or_path "$1" --reward_model_name_or_path "$2" \
    --output_dir "$3" --train_datasets "$4"
