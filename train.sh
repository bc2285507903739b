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

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
if (($# < 3)) || [[ $1 == --* || $2 == --* || $3 == --* ]]; then
    echo "error: MODEL, OUT and DATA are needed, in this order, before any flag" >&2
    usage >&2
    exit 2
fi
take_launch_flags "${@:4}"
hand_over Training train rank --model_name_or_path "$1" --output_dir "$2" --data_path "$3"
