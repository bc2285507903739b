#!/usr/bin/env bash
# The second half of response_gen.sh alone: score the responses of a candidate file.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../configs/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../configs/environment.sh"

usage() {
    cat <<'TEXT'
usage: bash data_generation/scoring_responses.sh IN OUT [flags of `rrhf score`]

  IN    candidate file, as `rrhf generate` writes it
  OUT   candidate file to write, the same with scores

`rrhf score --help all` lists the flags.
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
if (($# < 2)) || [[ $1 == --* || $2 == --* ]]; then
    echo "error: IN and OUT are needed, in this order, before any flag" >&2
    usage >&2
    exit 2
fi
input=$1 output=$2
shift 2

ensure_command
gpus=$(count_gpus)
if ((gpus > 1)); then
    exec "${ranks[@]}" python -m torch.distributed.run --standalone --nproc_per_node "$gpus" \
        -m rrhf.cli.main score --input_file "$input" --output_file "$output" "$@"
fi
exec rrhf score --input_file "$input" --output_file "$output" "$@"
