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

require_words 2 "IN and OUT" "$@"
on_all_gpus score --input_file "$1" --output_file "$2" "${@:3}"
