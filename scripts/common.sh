# Sourced by the launchers: the Python to use, messages, and small checks.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Threads that wait spin for a moment only and then sleep: on a busy machine a spinning one takes the time of the one it
# waits for. Libgomp goes by its own variable (benchmarks/busy.py), other OpenMPs by the policy.
if [[ -z ${OMP_WAIT_POLICY:-} ]]; then
    export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
fi

say() { echo "[$(date +%H:%M:%S)] $*"; }

die() {
    echo "error: $*" >&2
    exit 1
}

# Some Python for scripts/launch_variables.py, which needs no package.
any_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} "$ROOT/.venv/bin/python" python3 python; do
        if command -v "$candidate" >/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python found on PATH"
}

# variables ACTION PROGRAM: see scripts/launch_variables.py, the table of all variables of the launchers.
variables() {
    local python seen=
    python=$(any_python)
    if [[ $1 == check && $2 == @(train|eval) && -z ${N_GPUS_PER_NODE:-} ]]; then
        seen=$(count_gpus) || return 1
    fi
    SEEN_GPUS=$seen "$python" "$ROOT/scripts/launch_variables.py" "$@"
}

# An empty variable is as good as none, for everything that reads it. (SERPER_CACHE_DIR: empty is no cache.)
forget_empty() {
    local name
    while read -r name; do
        [[ -z ${!name+set} || -n ${!name} || $name == SERPER_CACHE_DIR ]] || unset "$name"
    done < <(sed -n 's/^    Variable("\([A-Z_]*\)".*/\1/p' "$ROOT/scripts/launch_variables.py")
}
forget_empty

# help_if_asked SCRIPT ARGUMENT [PROGRAM]: if ARGUMENT asks for help, prints the header comment of SCRIPT and the
# variables of PROGRAM, and ends it.
help_if_asked() {
    case ${2:-} in
        -h | --help | help)
            sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p}}' "$1"
            if [[ -n ${3:-} ]]; then echo && variables help "$3"; fi
            exit 0
            ;;
    esac
}

has_project() { "$1" -c 'import importlib.metadata as m; m.version("siop-verl")' 2>/dev/null; }

# Sets PYTHON: the interpreter of CONDA_ENV if that is set, else of the activated virtual or conda environment, else
# .venv, else python. Conda activates its base environment by itself: it counts only if the project is in it.
pick_python() {
    if [[ -n ${CONDA_ENV:-} ]]; then
        command -v conda >/dev/null || die "CONDA_ENV=$CONDA_ENV is set, but there is no conda on PATH"
        PYTHON=$(conda run -n "$CONDA_ENV" python -c 'import sys; print(sys.executable)') ||
            die "CONDA_ENV=$CONDA_ENV: no such conda environment, or no Python in it"
    elif [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
        PYTHON=$VIRTUAL_ENV/bin/python
    elif [[ -n ${CONDA_PREFIX:-} && -x $CONDA_PREFIX/bin/python ]] &&
        { [[ ${CONDA_DEFAULT_ENV:-} != base ]] || has_project "$CONDA_PREFIX/bin/python"; }; then
        PYTHON=$CONDA_PREFIX/bin/python
    elif [[ -x $ROOT/.venv/bin/python ]]; then
        PYTHON=$ROOT/.venv/bin/python
    else
        PYTHON=$(command -v python || command -v python3) || die "no Python found; run: bash scripts/setup_env.sh"
    fi
    has_project "$PYTHON" ||
        die "this project is not installed in $PYTHON; run: bash scripts/setup_env.sh (CPU) or" \
            "pip install -r requirements.txt (GPU)"
    export PYTHON
    say "Python: $PYTHON"
}

# check_torch GPUS VARIABLE: refuses a CPU build of torch where GPUS are to be used; VARIABLE=0 asks for the CPU.
check_torch() {
    local version
    [[ $1 -gt 0 ]] || return 0
    version=$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("torch"))') ||
        die "torch is not installed in $PYTHON"
    [[ $version != *+cpu* ]] ||
        die "torch $version in $PYTHON is a CPU build, but $1 GPU(s) are to be used: activate the environment with" \
            "the GPU build (pip install -r requirements.txt), or set $2=0 to use the CPU"
}

# check_gpu_memory SHARE VARIABLE: refuses a share of GPU memory that is not free on one of the GPUs seen here.
check_gpu_memory() {
    local index free total
    while IFS=', ' read -r index free total; do
        awk -v free="$free" -v total="$total" -v share="$1" 'BEGIN { exit !(free < share * total) }' || continue
        die "$2=$1 asks for $(awk -v t="$total" -v s="$1" 'BEGIN { printf "%d", t * s }') MiB of GPU $index, of which" \
            "$free MiB are free: lower $2, stop what holds the rest, or name other GPUs (CUDA_VISIBLE_DEVICES)"
    done < <(nvidia-smi ${CUDA_VISIBLE_DEVICES:+-i "${CUDA_VISIBLE_DEVICES// /}"} \
        --query-gpu=index,memory.free,memory.total --format=csv,noheader,nounits 2>/dev/null | grep -E '^[0-9]+, [0-9]+, [0-9]+$')
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

# shellcheck disable=SC2034  # for the scripts that source this file
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
                show("success on training boards", "siop/outcome/success", "%.2f")
                show("right turns", "siop/outcome/oracle_rate", "%.2f")
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

# Forgets the variables that would lead the toy world's retriever to another corpus, index, server or address.
forget_retriever() {
    unset RETRIEVAL_SERVER_SCRIPT RETRIEVER_CORPUS_FILE RETRIEVER_CORPUS_DIR RETRIEVER_INDEX_DIR RETRIEVER_INDEX_FILE \
        RETRIEVER_NAME RETRIEVER_MODEL RETRIEVER_FAISS_GPU RETRIEVER_GPUS RETRIEVER_CONDA_ENV RETRIEVER_HOST \
        RETRIEVER_PORT RETRIEVER_TOPK RETRIEVER_URL
}

# trainer_words PROGRAM ARGUMENT ...: sets OVERRIDES and DRY_RUN from the arguments of a launcher. Overrides may come with and
# without -- before them, and our own keys with the + that the first release needed.
# shellcheck disable=SC2034  # for the scripts that source this file
trainer_words() {
    local program=$1 word only_words=
    shift
    OVERRIDES=() DRY_RUN=
    for word in "$@"; do
        if [[ $word =~ ^\++(algorithm\.siop_[a-z_]+=.*)$ ]]; then
            OVERRIDES+=("${BASH_REMATCH[1]}")
        elif [[ $word == [a-zA-Z_+~]*=* || $word == ~* || (-n $only_words && $word != --dry-run) ]]; then
            OVERRIDES+=("$word")
        elif [[ $word == -- ]]; then
            only_words=1
        elif [[ $word == --dry-run ]]; then
            DRY_RUN=1
        elif [[ $word == -h || $word == --help ]]; then
            help_if_asked "$0" "$word" "$program"
        else
            die "unknown argument '$word'; Hydra overrides have the form key=value, see --help"
        fi
    done
}

# data_args PROGRAM: takes TRAIN_FILE and VAL_FILE, where they are not set, and DATA_ARGS from DATA_DIR.
data_args() {
    DATA_ARGS=()
    [[ -n ${DATA_DIR:-} ]] || return 0
    DATA_DIR=${DATA_DIR%/}
    mapfile -d '' -t DATA_ARGS < <("$PYTHON" "$ROOT/scripts/data_overrides.py" "$DATA_DIR")
    wait $! || exit 1
    [[ -n ${TRAIN_FILE:-} || ! -f $DATA_DIR/train.parquet ]] || TRAIN_FILE=$DATA_DIR/train.parquet
    [[ -n ${VAL_FILE:-} || ! -f $DATA_DIR/eval.parquet ]] || VAL_FILE=$DATA_DIR/eval.parquet
    [[ $1 != train || -n ${TRAIN_FILE:-} ]] || die "DATA_DIR=$DATA_DIR holds no train.parquet: set TRAIN_FILE"
    [[ -n ${VAL_FILE:-} ]] || die "DATA_DIR=$DATA_DIR holds no eval.parquet: set VAL_FILE"
}

# trainer_args PROGRAM TOY: sets TRAINER_ARGS and DEVICE for verl.trainer.siop.main from the variables of PROGRAM (train
# or eval). TOY is not empty if the user has named neither model nor data: then those of the toy world are taken.
# shellcheck disable=SC2034  # for the scripts that source this file
trainer_args() {
    local program=$1 toy=${TOY_DIR:-runs/toy} gpus own
    TRAINER_ARGS=(--config-dir "$ROOT/config")
    if [[ -n $2 ]]; then
        [[ -f $toy/eval.parquet ]] ||
            die "no model and no data named, and no toy world in $toy: set MODEL_PATH, TRAIN_FILE and VAL_FILE, or" \
                "build it with: $PYTHON -m examples.toy_world.build --out $toy"
        MODEL_PATH=${MODEL_PATH:-$toy/model}
        VAL_FILE=$toy/eval.parquet
        # Data without a training part (eval_siop.sh --toy-seed) is only evaluated.
        TRAIN_FILE=$([[ -f $toy/train.parquet ]] && echo "$toy/train.parquet" || echo "$VAL_FILE")
        TOOL_CONFIG=${TOOL_CONFIG:-$toy/tool_config.yaml}
        TRAINER_ARGS+=("experiment=$(toy_settings "$toy")")
        say "the toy world in $toy, because neither a model nor data is named"
    fi
    data_args "$program"
    [[ -n ${MODEL_PATH:-} ]] || die "set MODEL_PATH to the policy, a transformers model (folder or hub id)"
    [[ $program != train || -n ${TRAIN_FILE:-} ]] || die "set TRAIN_FILE to the training data (parquet)"
    [[ -n ${VAL_FILE:-} ]] ||
        die "set VAL_FILE to the validation data (parquet)" \
            "${CHECKPOINT_PATH:+; or, on the toy world: bash eval_siop.sh $CHECKPOINT_PATH, without CHECKPOINT_PATH}"
    TRAIN_FILE=${TRAIN_FILE:-$VAL_FILE}
    toy=$(dirname "$VAL_FILE")
    [[ -n $2 || ! -f $toy/meta.json || ! -f $toy/tool_config.yaml || " ${OVERRIDES[*]-} " == *" experiment=toy"* ]] ||
        say "warning: $VAL_FILE is of a toy world, whose model knows few words: without TOOL_CONFIG=$toy/tool_config.yaml" \
            "and the override experiment=$(toy_settings "$toy") it meets others"
    # Before the variables, so that these win.
    TRAINER_ARGS+=(${DATA_ARGS[@]+"${DATA_ARGS[@]}"})
    [[ " ${DATA_ARGS[*]-}" == *" actor_rollout_ref.rollout.multi_turn.tool_config_path="* ]] ||
        TOOL_CONFIG=${TOOL_CONFIG:-config/local_search_tool_config.yaml}
    export MODEL_PATH TRAIN_FILE VAL_FILE TOOL_CONFIG=${TOOL_CONFIG:-}
    gpus=${N_GPUS_PER_NODE:-$(count_gpus)}
    if [[ $gpus -eq 0 ]]; then
        use_cpu
        DEVICE=CPU
        if [[ ${RAY_ADDRESS:-local} == local ]]; then TRAINER_ARGS+=(hardware=cpu); else TRAINER_ARGS+=(hardware=cpu_cluster); fi
    else
        DEVICE="$gpus GPU(s)"
        check_torch "$gpus" N_GPUS_PER_NODE
        check_gpu_memory "${ROLLOUT_GPU_MEM:-0.5}" ROLLOUT_GPU_MEM
        TRAINER_ARGS+=("trainer.n_gpus_per_node=$gpus")
        if ! "$PYTHON" -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("flash_attn"))'; then
            say "flash-attn is not installed: attention by sdpa, slower on long rollouts" \
                "(pip install flash-attn --no-build-isolation)"
            TRAINER_ARGS+=(++actor_rollout_ref.model.override_config.attn_implementation=sdpa)
        fi
    fi
    export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0} RAY_DEDUP_LOGS=${RAY_DEDUP_LOGS:-0}
    export RAY_memory_monitor_refresh_ms=${RAY_memory_monitor_refresh_ms:-0}
    export RAY_ENABLE_UV_RUN_RUNTIME_ENV=${RAY_ENABLE_UV_RUN_RUNTIME_ENV:-0}
    own=$(N_GPUS_PER_NODE=$gpus variables overrides "$program")
    mapfile -t -O "${#TRAINER_ARGS[@]}" TRAINER_ARGS <<<"$own"
}

# dry_run PROGRAM COMMAND ...: prints the variables of PROGRAM and the command, and for the trainer its configuration.
dry_run() {
    local program=$1
    shift
    echo "variables (defaults in brackets; a named experiment or DATA_DIR has its own, which the configuration shows):"
    variables show "$program"
    echo "command:"
    printf '  '
    printf '%q ' "$@"
    echo
    [[ $program == train || $program == eval ]] || return 0
    echo "configuration:"
    PYTHONWARNINGS=ignore "$@" --cfg job --resolve
}
