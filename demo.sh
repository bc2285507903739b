#!/usr/bin/env bash
# The demonstration: sets up what is needed, then shows a small language model become measurably
# better by RRHF. Arguments are passed on: bash demo.sh --seeds 3; bash demo.sh --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=configs/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/configs/environment.sh"

ensure_environment ""
exec rrhf demo "$@"
