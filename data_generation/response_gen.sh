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
  OUT_DIR     folder for generated.jsonl and train_data.json
  true|false  diverse beam search (default), or plain beam search

Flags are those of `rrhf generate` and `rrhf score`; `rrhf response-gen --help all` lists them.
The result is OUT_DIR/train_data.json, the DATA of train.sh. A run that was stopped resumes when it
is started again with the same arguments.
TEXT
}

require_words 2 "MODEL and OUT_DIR" "$@"
# Each process writes its share; the first one merges them in the order of the prompts.
on_all_gpus response-gen "$@"
