#!/usr/bin/env bash
# Sample responses to prompts and score them: `rrhf generate`, then `rrhf score`, on one GPU, on all
# of them, or on the CPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../configs/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../configs/environment.sh"

usage() {
    cat <<'TEXT'
usage: bash data_generation/response_gen.sh MODEL OUT_DIR [true|false] [flags]

  MODEL       folder or hub name of the policy that writes the responses
  OUT_DIR     gets generated.jsonl and, in the end, train_data.json
  true|false  diverse beam search (default), or plain beam search

Flags are those of `rrhf generate` and `rrhf score`; `rrhf response-gen --help all` lists them.
The end is OUT_DIR/train_data.json, the DATA of train.sh. A run that was stopped goes on where it
was when started again with the same arguments.
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
if (($# < 2)) || [[ $1 == --* || $2 == --* ]]; then
    echo "error: MODEL and OUT_DIR are needed, in this order, before any flag" >&2
    usage >&2
    exit 2
fi

ensure_command
gpus=$(count_gpus)
if ((gpus > 1)); then
    # One process a GPU; each writes its share, the first one merges them in the order of the prompts.
    exec "${ranks[@]}" python -m torch.distributed.run --standalone --nproc_per_node "$gpus" \
        -m rrhf.cli.main response-gen "$@"
fi
exec rrhf response-gen "$@"
