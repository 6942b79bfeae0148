# Sourced by the launchers: the Python to use, messages, and small checks.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "[$(date +%H:%M:%S)] $*"; }

die() {
    echo "error: $*" >&2
    exit 1
}

# Prints the header comment of a script as its help text.
print_help() { sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p}}' "$1"; }

# help_if_asked SCRIPT ARGUMENT: prints the help of SCRIPT and ends it if ARGUMENT asks for help.
help_if_asked() {
    case ${2:-} in
        -h | --help)
            print_help "$1"
            exit 0
            ;;
    esac
}

# Sets PYTHON: the interpreter of CONDA_ENV if that is set, else of the active virtual environment, else .venv, else
# python.
pick_python() {
    if [[ -n ${CONDA_ENV:-} ]]; then
        command -v conda >/dev/null || die "CONDA_ENV=$CONDA_ENV is set, but there is no conda on PATH"
        PYTHON=$(conda run -n "$CONDA_ENV" python -c 'import sys; print(sys.executable)') ||
            die "CONDA_ENV=$CONDA_ENV: no such conda environment, or no Python in it"
    elif [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
        PYTHON=$VIRTUAL_ENV/bin/python
    elif [[ -x $ROOT/.venv/bin/python ]]; then
        PYTHON=$ROOT/.venv/bin/python
    else
        PYTHON=$(command -v python || command -v python3) || die "no Python found; run: bash scripts/setup_env.sh"
    fi
    "$PYTHON" -c 'import importlib.metadata as m; m.version("siop-verl")' 2>/dev/null ||
        die "this project is not installed in $PYTHON; run: bash scripts/setup_env.sh (CPU) or" \
            "pip install -r requirements.txt (GPU)"
    export PYTHON
}

# check_number NAME LEAST MOST [LABEL]: refuses a value of the variable NAME that is no whole number in this range. Unset
# or empty stands for the default. LABEL is what the user calls it, if not NAME.
check_number() {
    local value=${!1:-}
    [[ -n $value ]] || return 0
    # No leading zeros: neither bash nor Hydra reads them as decimal.
    if ! [[ $value =~ ^(0|[1-9][0-9]{0,9})$ ]] || ((value < $2 || value > $3)); then
        die "${4:-$1=}$value is not allowed: a whole number from $2 to $3"
    fi
}

MAX_INT=2147483647

# Number of GPUs that a process started here sees: those that nvidia-smi lists, or of them what CUDA_VISIBLE_DEVICES
# names. As in CUDA, the list ends at the first entry that names none, such as -1.
count_gpus() {
    local visible=${CUDA_VISIBLE_DEVICES-all} listed=0 count=0 entry entries
    if command -v nvidia-smi >/dev/null; then
        listed=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || listed=0
    fi
    if [[ $listed -eq 0 || $visible == all ]]; then
        echo "$listed"
        return
    fi
    IFS=, read -ra entries <<<"${visible// /}"
    for entry in ${entries[@]+"${entries[@]}"}; do
        if [[ $entry =~ ^[0-9]{1,4}$ ]]; then
            ((10#$entry < listed)) ||
                die "CUDA_VISIBLE_DEVICES=$visible: there is no GPU $entry, nvidia-smi lists 0 to $((listed - 1))"
        elif [[ ! $entry =~ ^(GPU|MIG)- ]]; then
            break
        fi
        count=$((count + 1))
    done
    echo "$count"
}

# Environment that every process of this project gets on a machine without a GPU.
use_cpu() {
    export VERL_PLATFORM=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Set but empty, it makes verl look for a GPU that is not there.
    unset CUDA_VISIBLE_DEVICES
}

port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Length of a log in bytes, 0 if there is none: where the part begins that is appended next.
log_length() { if [[ -f $1 ]]; then stat -c %s "$1"; else echo 0; fi; }

# run_watch LOG START PID STEPS: while PID runs, prints a line for about every tenth step in its log after START bytes.
run_watch() {
    local log=$1 start=$2 pid=$3 steps=$4
    while [[ ! -f $log ]] && kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
    local every=$(((steps + 9) / 10))
    tail -c "+$((start + 1))" -F --pid="$pid" "$log" 2>/dev/null | awk -v steps="$steps" -v every="$every" '
        # A metric that the method does not have is not shown.
        function show(label, name, form,  i) {
            i = index($0, " " name ":")
            if (i) line = line "  " label " " sprintf(form, substr($0, i + length(name) + 2) + 0)
        }
        match($0, /step:[0-9]+ - /) {
            step = substr($0, RSTART + 5, RLENGTH - 8) + 0
            if (step % every == 0 || step == 1 || step == steps) {
                line = "           step " step "/" steps
                show("turns", "siop/turns/mean", "%.2f")
                show("no answer", "siop/no_answer", "%.2f")
                show("EM on training questions", "siop/outcome/em", "%.2f")
                show("seconds", "timing_s/step", "%.1f")
                print line
                fflush()
            }
        }' &
    wait $! || true
}

free_port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# The settings (config/experiment) for the toy world in a folder.
toy_settings() { if grep -qs '"world": "chains"' "$1/meta.json"; then echo toy_chains; else echo toy; fi; }

# Refuses numbers for the trainer that it could not use. In a function of its own to come before anything is started.
check_trainer_numbers() {
    check_number N_GPUS 0 1024
    check_number SEED 0 "$MAX_INT"
}

# Forgets the variables that would lead the toy world's retriever to another corpus, index, server or address.
forget_retriever() {
    unset RETRIEVAL_SERVER_SCRIPT RETRIEVER_CORPUS_FILE RETRIEVER_INDEX_DIR RETRIEVER_INDEX_PATH RETRIEVER_NAME \
        RETRIEVER_MODEL RETRIEVER_FAISS_GPU RETRIEVER_HOST RETRIEVER_PORT RETRIEVER_TOPK RETRIEVER_URL
}

# shellcheck disable=SC2034  # DEVICE is for the scripts that source this file.
# trainer_args DATA: sets TRAINER_ARGS, MODEL_PATH and DEVICE for verl.trainer.siop.main from the environment variables
# of train_siop.sh. Without DATA, the toy world's data, model, tool and settings are taken.
trainer_args() {
    local data=$1 toy=${TOY_DIR:-runs/toy}
    TRAINER_ARGS=(--config-dir "$ROOT/config")
    if [[ -z $data ]]; then
        [[ -f $toy/eval.parquet ]] ||
            die "no data named and no toy world in $toy; build it with: $PYTHON -m examples.toy_world.build --out $toy"
        MODEL_PATH=${MODEL_PATH:-$toy/model}
        VAL_FILES=${VAL_FILES:-$toy/eval.parquet}
        # Data without a training part (eval_siop.sh --toy-seed) is only evaluated.
        TRAIN_FILES=$([[ -f $toy/train.parquet ]] && echo "$toy/train.parquet" || echo "$VAL_FILES")
        TOOL_CONFIG=${TOOL_CONFIG:-$toy/tool_config.yaml}
        TRAINER_ARGS+=("experiment=$(toy_settings "$toy")")
    fi
    [[ -n ${MODEL_PATH:-} ]] || die "set MODEL_PATH to the model to train"
    [[ -n ${VAL_FILES:-} ]] || die "set VAL_FILES to the validation data (parquet)"
    local gpus
    gpus=${N_GPUS:-$(count_gpus)}
    if [[ $gpus -eq 0 ]]; then
        use_cpu
        DEVICE=CPU
        TRAINER_ARGS+=(hardware=cpu)
    else
        DEVICE="$gpus GPU(s)"
        TRAINER_ARGS+=("trainer.n_gpus_per_node=$gpus")
    fi
    export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0} RAY_DEDUP_LOGS=${RAY_DEDUP_LOGS:-0}
    TRAINER_ARGS+=(
        "actor_rollout_ref.model.path=$MODEL_PATH"
        "data.train_files=${TRAIN_FILES:-$VAL_FILES}"
        "data.val_files=$VAL_FILES"
        "actor_rollout_ref.rollout.multi_turn.tool_config_path=${TOOL_CONFIG:-config/local_search_tool_config.yaml}"
        "data.seed=${SEED:-1}"
        "actor_rollout_ref.rollout.seed=${SEED:-1}"
    )
}
