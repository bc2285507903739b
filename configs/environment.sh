# shellcheck shell=bash
# Sourced by the scripts of this repository: makes sure that `rrhf` can be run.
#
# An active environment (venv or conda) is used as it is; otherwise `.venv` next to the scripts is
# made and activated. The hash of setup.cfg and pyproject.toml records what is installed, so a second
# run starts at once.

# shellcheck disable=SC2034 # for those who source this
ranks=(python -m rrhf.cli.launch) # before a launcher: ends with the exit code of its ranks

# A signal ends a script as it ends a command, once the program that it is waiting for has ended.
trap 'exit 75' TERM
trap 'exit 130' INT

repository_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

environment_is_active() {
    [[ -n ${VIRTUAL_ENV:-} ]] || [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]
}

# Prints the first Python of version 3.11 or later; PYTHON, where set, is the only candidate.
find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3 python)
    if [[ -n ${PYTHON:-} ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or later found (tried: ${candidates[*]}); install one, or set PYTHON." >&2
    return 1
}

make_venv() {
    local python
    python=$(find_python) || return
    echo "Making the environment $repository_root/.venv with $("$python" --version) ..." >&2
    rm -rf -- "$repository_root/.venv"
    if ! "$python" -m venv "$repository_root/.venv"; then
        rm -rf -- "$repository_root/.venv"
        echo "error: $python cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2
        return 1
    fi
}

activate_venv() {
    # shellcheck source=/dev/null
    source "$repository_root/.venv/bin/activate"
}

# ensure_environment EXTRAS: installs `rrhf` and the packages of the extras ("test,dev", or "" for
# none), unless they are installed.
ensure_environment() {
    local extras=$1 fingerprint stamp
    if ! environment_is_active; then
        if ! "$repository_root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
            make_venv || return
        fi
        activate_venv
    fi
    fingerprint=$(cat "$repository_root/setup.cfg" "$repository_root/pyproject.toml" | sha256sum)
    fingerprint="${fingerprint%% *} $repository_root"
    stamp=$(python -c 'import sys; print(sys.prefix)')/.rrhf-installed-${extras:-base}
    if [[ -f $stamp && $(<"$stamp") == "$fingerprint" ]]; then
        return
    fi
    echo "Installing rrhf and what it needs (once; a few minutes where torch must be downloaded) ..." >&2
    local quiet=()
    [[ -t 1 ]] || quiet=(--quiet)
    ended_by_signals install_package "${quiet[@]}" -e ".${extras:+[$extras]}" >&2 || return
    printf '%s\n' "$fingerprint" >"$stamp"
}

install_package() {
    cd -- "$repository_root" || exit
    exec python -m pip install --disable-pip-version-check "$@"
}

# ended_by_signals COMMAND...: for commands that take minutes: a signal ends the command with all that
# it started.
ended_by_signals() {
    local group status=0
    set -m # a process group of its own
    "$@" &
    group=$!
    set +m
    trap 'kill -TERM -- "-$group" 2>/dev/null; wait "$group" || true; exit 75' TERM
    trap 'kill -TERM -- "-$group" 2>/dev/null; wait "$group" || true; exit 130' INT
    wait "$group" || status=$?
    trap 'exit 75' TERM
    trap 'exit 130' INT
    return "$status"
}

# ensure_command: as above, unless some environment offers `rrhf` already.
ensure_command() {
    if command -v rrhf >/dev/null; then
        return
    fi
    ensure_environment ""
}

# require_words COUNT NAMES WORD...: ends the script if the words ask for help, or if fewer than
# COUNT stand before the first flag; the script defines `usage`.
require_words() {
    local count=$1 names=$2 word
    shift 2
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        usage
        exit 0
    fi
    for word in "${@:1:count}"; do
        [[ $word != --* ]] || set --
    done
    if (($# < count)); then
        echo "error: $names are needed, in this order, before any flag" >&2
        usage >&2
        exit 2
    fi
}

# on_all_gpus TASK...: becomes `rrhf TASK...`, one process for each GPU where there are several.
on_all_gpus() {
    local gpus
    ensure_command
    gpus=$(count_gpus)
    if ((gpus > 1)); then
        exec "${ranks[@]}" python -m torch.distributed.run --standalone --nproc_per_node "$gpus" \
            -m rrhf.cli.main "$@"
    fi
    exec rrhf "$@"
}

# Prints the number of NVIDIA GPUs that programs may use.
count_gpus() {
    local visible
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        visible=${CUDA_VISIBLE_DEVICES//[[:space:]]/}
        if [[ -z $visible || $visible == -1 ]]; then
            echo 0
        else
            tr ',' '\n' <<<"$visible" | wc -l
        fi
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}
