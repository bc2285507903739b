#!/usr/bin/env bash
# Train a policy on ranked candidates: finds the devices, chooses the launch, hands over to
# `rrhf train rank`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=configs/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/configs/environment.sh"

usage() {
    cat <<'TEXT'
usage: bash train.sh MODEL OUT DATA [--launch NAME] [--num_processes N] [flags of `rrhf train rank`]

  MODEL   folder or hub name of the policy to start from
  OUT     run folder: checkpoints, metrics, and the trained model in OUT/policy
  DATA    candidate file, as data_generation/response_gen.sh writes it (train_data.json)

  --launch NAME       cpu, gpu, ddp, fsdp2, zero2, zero3, or a file for `accelerate launch`.
                      By default: fsdp2 on several GPUs, gpu on one, cpu without.
  --num_processes N   processes, one a GPU (default: all GPUs; 2 for ddp on CPUs)

On GPUs that can do it, bfloat16 mixed precision is on, and flash attention where the package
flash-attn is installed; a --config file and flags override both.
`rrhf train rank --help` lists the flags.
TEXT
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
task=(train rank --model_name_or_path "$1" --output_dir "$2" --data_path "$3")
shift 3

launch=auto
processes=
flags=()
while (($#)); do
    case $1 in
        --launch | --num_processes)
            if (($# < 2)); then
                echo "error: $1 needs a value" >&2
                exit 2
            fi
            if [[ $1 == --launch ]]; then launch=$2; else processes=$2; fi
            shift 2
            ;;
        --launch=*) launch=${1#*=} && shift ;;
        --num_processes=*) processes=${1#*=} && shift ;;
        *) flags+=("$1") && shift ;;
    esac
done
if [[ -n $processes && ! $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "error: --num_processes $processes: expected a whole number above 0" >&2
    exit 2
fi

ensure_command
gpus=$(count_gpus)
if [[ $launch == auto ]]; then
    if ((gpus > 1)); then launch=fsdp2; elif ((gpus == 1)); then launch=gpu; else launch=cpu; fi
fi

# The preset that fits these GPUs: mixed precision and flash attention where both work.
precision=()
if ((gpus > 0)) && [[ $launch != cpu ]]; then
    preset=$(python "$repository_root/configs/gpu_preset.py")
    if [[ $preset == none ]]; then
        echo "note: this PyTorch cannot use the GPUs of this machine; training on the CPU" >&2
        launch=cpu
    elif [[ $preset != float32 ]]; then
        precision=(--config "$preset")
    fi
fi

case $launch in
    cpu)
        export CUDA_VISIBLE_DEVICES=
        command=(rrhf)
        ;;
    gpu)
        command=(rrhf)
        ;;
    ddp | fsdp2 | zero2 | zero3)
        if ((gpus == 0)) && [[ $launch == ddp ]]; then
            command=(python -m torch.distributed.run --standalone
                --nproc_per_node "${processes:-2}" -m rrhf.cli.main)
        elif ((gpus == 0)); then
            echo "error: --launch $launch needs GPUs, and none was found; use cpu or ddp" >&2
            exit 2
        else
            command=(accelerate launch --config_file "$repository_root/configs/$launch.yaml")
            if [[ $launch == zero* ]]; then
                command+=(--deepspeed_config_file "$repository_root/configs/deepspeed_$launch.json")
            fi
            command+=(--num_processes "${processes:-$gpus}" -m rrhf.cli.main)
        fi
        ;;
    *)
        if [[ ! -f $launch ]]; then
            echo "error: --launch $launch: no such file, and none of cpu, gpu, ddp, fsdp2, zero2, zero3" >&2
            exit 2
        fi
        command=(accelerate launch --config_file "$launch")
        [[ -z $processes ]] || command+=(--num_processes "$processes")
        command+=(-m rrhf.cli.main)
        ;;
esac

echo "Training on $gpus GPU(s), launch: $launch" >&2
exec "${command[@]}" "${task[@]}" "${precision[@]}" "${flags[@]}"
