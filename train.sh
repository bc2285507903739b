#!/usr/bin/env bash
# Train a policy on ranked candidates: finds the devices, chooses the launch, hands over to
# `rrhf train rank`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=configs/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/configs/launch.sh"

usage() {
    cat <<'TEXT'
usage: bash train.sh MODEL OUT DATA [--launch NAME] [--num_processes N] [flags of `rrhf train rank`]

  MODEL   folder or hub name of the policy to start from
  OUT     run folder: checkpoints, metrics, and the trained model in OUT/policy
  DATA    candidate file, as data_generation/response_gen.sh writes it (train_data.json)

TEXT
    launch_help
    # shellcheck disable=SC2016 # the marks are the text's
    echo '`rrhf train rank --help all` lists the flags.'
}

require_words 3 "MODEL, OUT and DATA" "$@"
take_launch_flags "${@:4}"
hand_over Training train rank --model_name_or_path "$1" --output_dir "$2" --data_path "$3"
