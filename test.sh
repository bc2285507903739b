#!/usr/bin/env bash
# The tests: sets up what is needed, then runs pytest. Arguments are passed on:
# bash test.sh tests/scoring -k window; bash test.sh -m slow.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=configs/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/configs/environment.sh"

ensure_environment test
cd -- "$repository_root"
workers=$(env -u OMP_NUM_THREADS nproc)
# One thread a worker: the models are tiny, and workers that share cores slow each other down.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# A file at a time: what its tests share is made once.
exec python -m pytest -n "$((workers < 8 ? workers : 8))" --dist loadfile "$@"
