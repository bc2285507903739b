# shellcheck shell=bash
# Sourced by train.sh and ppo.sh: finds the devices, chooses the launch, hands over to `rrhf`.
#
# Use: take_launch_flags "$@", then hand_over WHAT TASK...

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

# What --help says of the flags that are taken here.
launch_help() {
    cat <<'TEXT'
  --launch NAME       cpu, gpu, ddp, fsdp2, zero2, zero3, or a file for `accelerate launch`.
                      By default: fsdp2 on several GPUs, gpu on one, cpu without. On CPUs ddp,
                      zero2 and zero3 run too (zero* compile a part of DeepSpeed once, in minutes).
  --num_processes N   processes, one a GPU (default: all GPUs; 2 on CPUs)

On GPUs that can do it, bfloat16 mixed precision is on, and flash attention where the package
flash-attn is installed; a --config file and flags override both.
TEXT
}

# Sets `launch`, `processes` (empty = as the machine has it) and `flags` (all others).
take_launch_flags() {
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
}

# hand_over WHAT TASK...: becomes the command of `rrhf TASK... PRESET FLAGS...`; does not return.
hand_over() {
    local what=$1
    shift
    local task=("$@") gpus preset precision=() command

    ensure_command
    gpus=$(count_gpus)
    if [[ $launch == auto ]]; then
        if ((gpus > 1)); then launch=fsdp2; elif ((gpus == 1)); then launch=gpu; else launch=cpu; fi
    fi

    # The preset that fits these GPUs: mixed precision and flash attention where both work.
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
        ddp | fsdp2 | zero2 | zero3) spread_command ;;
        *)
            if [[ ! -f $launch ]]; then
                echo "error: --launch $launch: no such file, and none of cpu, gpu, ddp, fsdp2, zero2, zero3" >&2
                exit 2
            fi
            command=("${ranks[@]}" accelerate launch --config_file "$launch")
            [[ -z $processes ]] || command+=(--num_processes "$processes")
            command+=(-m rrhf.cli.main)
            ;;
    esac

    local devices="$gpus GPU(s)"
    if ((gpus == 0)) || [[ $launch == cpu ]]; then devices="the CPU"; fi
    echo "$what on $devices, launch: $launch" >&2
    exec "${command[@]}" "${task[@]}" "${precision[@]}" "${flags[@]}"
}

# Sets `command` to start several processes, for `hand_over`.
spread_command() {
    local settings="$repository_root/configs/deepspeed_$launch.json"
    if ((gpus > 0)); then
        command=("${ranks[@]}" accelerate launch)
        command+=(--config_file "$repository_root/configs/$launch.yaml")
        if [[ $launch == zero* ]]; then
            command+=(--deepspeed_config_file "$settings")
        fi
        command+=(--num_processes "${processes:-$gpus}" -m rrhf.cli.main)
        return
    fi
    if [[ $launch == fsdp2 ]]; then
        echo "error: --launch fsdp2 needs GPUs, and none was found; use cpu, ddp or zero2" >&2
        exit 2
    fi
    if [[ $launch == zero* ]]; then # by itself accelerate would run ddp here
        export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE="$settings"
    fi
    command=("${ranks[@]}" python -m torch.distributed.run --standalone
        --nproc_per_node "${processes:-2}" -m rrhf.cli.main)
}
