#!/usr/bin/env bash
# Evaluates a policy by sampling and prints EM, F1, turns and response tokens. The retriever must be up.
#
#   bash eval_siop.sh CHECKPOINT [--toy-seed N] [-- HYDRA_OVERRIDE ...]
#
# CHECKPOINT is a transformers model (a folder, or a hub id such as Qwen/Qwen3-4B), or a folder global_step_N of
# train_siop.sh. Folders without a transformers copy of the weights (actor/huggingface/*.safetensors) need MODEL_PATH,
# the model that training started from.
#   --toy-seed N   evaluate on facts and names of a toy world generated with seed N (own retriever, stopped at the end)
#
# Environment:
#   VAL_FILES        parquet file(s) in verl's RL format; default: the toy world's (TOY_DIR), with its tool and
#                    settings; not together with --toy-seed
#   TRAIN_FILES      training data, which verl opens here too (VAL_FILES)
#   MODEL_PATH       model that training started from, for a CHECKPOINT without a transformers copy
#   TOY_DIR          the toy world (runs/toy); with --toy-seed N its kind is evaluated, in $TOY_DIR-seed-N
#   EXPERIMENT       name of the evaluation (eval)
#   OUT_DIR          metrics and rollouts (runs/$EXPERIMENT)
#   LOG_DIR          place of eval-$EXPERIMENT.log (logs)
#   TOOL_CONFIG      tool configuration (config/local_search_tool_config.yaml)
#   RETRIEVER_URL    the retriever's address (http://127.0.0.1:8000/retrieve)
#   RETRIEVER_START_TIMEOUT  seconds to wait for the retriever of --toy-seed (1800)
#   N_GPUS           GPUs (those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists; 0 means CPU)
#   RAY_ADDRESS      Ray cluster to join (none: a private Ray)
#   OMP_NUM_THREADS  threads of each process on a CPU (1)
#   SEED             seed of sampling (1)
#   CONDA_ENV        conda environment to run in (default: active Python, or .venv)
#   SERPER_API_KEY   key of the web search tool, if TOOL_CONFIG is config/serper_tool_config.yaml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}"
case ${1:-} in
    "" | -*) die "which checkpoint? bash eval_siop.sh CHECKPOINT; see --help" ;;
esac
checkpoint=$1
shift
toy_seed=
if [[ ${1:-} == --toy-seed ]]; then
    toy_seed=${2:?--toy-seed needs a number}
    shift 2
fi
case ${1:-} in
    "" | --) [[ $# -eq 0 ]] || shift ;;
    *) die "unknown argument '$1'; Hydra overrides go after --, see bash eval_siop.sh --help" ;;
esac
if [[ -n $toy_seed ]]; then
    check_number toy_seed 0 "$MAX_INT" "--toy-seed "
    [[ -z ${VAL_FILES:-} ]] ||
        die "VAL_FILES=$VAL_FILES and --toy-seed $toy_seed name different data: unset VAL_FILES or leave --toy-seed out"
    check_number RETRIEVER_START_TIMEOUT 1 "$MAX_INT"
fi
check_trainer_numbers
from_hub=
if [[ ! -d $checkpoint ]]; then
    # A path into a folder that exists is a mistyped path.
    [[ $checkpoint =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ && ! -e $checkpoint && ! -e ${checkpoint%%/*} ]] ||
        die "CHECKPOINT=$checkpoint: no such folder, nor a model id ORG/NAME of the hub"
    from_hub=1
fi
pick_python

EXPERIMENT=${EXPERIMENT:-eval}
OUT_DIR=${OUT_DIR:-runs/$EXPERIMENT}
LOG_DIR=${LOG_DIR:-logs}
mkdir -p "$OUT_DIR" "$LOG_DIR"
checkpoint=${checkpoint%/}
resume=(trainer.resume_mode=disable)
if [[ -n $from_hub || -f $checkpoint/config.json ]]; then
    MODEL_PATH=$checkpoint
elif compgen -G "$checkpoint/actor/huggingface/*.safetensors" >/dev/null; then
    MODEL_PATH=$checkpoint/actor/huggingface
elif [[ -d $checkpoint/actor ]]; then
    [[ -n ${MODEL_PATH:-} ]] ||
        die "$checkpoint holds sharded weights only: set MODEL_PATH to the model that training started from"
    resume=(trainer.resume_mode=resume_path "trainer.resume_from_path=$checkpoint")
else
    die "CHECKPOINT=$checkpoint is neither a transformers model (config.json) nor a folder global_step_N (actor/)"
fi

if [[ -n $toy_seed ]]; then
    TOY_DIR=${TOY_DIR:-runs/toy}
    TOY_DIR=${TOY_DIR%/}
    world=$([[ $(toy_settings "$TOY_DIR") == toy ]] && echo two_hop || echo chains)
    TOY_DIR+=-seed-$toy_seed
    "$PYTHON" -m examples.toy_world.build --data-only --world "$world" --seed "$toy_seed" --out "$TOY_DIR"
    forget_retriever
    port=$(free_port)
    export RETRIEVER_URL=http://127.0.0.1:$port/retrieve
    service=(env "RETRIEVER_CORPUS_FILE=$TOY_DIR/corpus.jsonl" "RETRIEVER_PORT=$port" "LOG_DIR=$OUT_DIR/logs"
        bash launch_retriever.sh)
    trap '"${service[@]}" stop' EXIT
    "${service[@]}"
fi
trainer_args "${VAL_FILES:-}"
rm -rf "$OUT_DIR/validation"
log=$LOG_DIR/eval-$EXPERIMENT.log
say "evaluating $checkpoint${from_hub:+ of the model hub} on $DEVICE; log: $log"
if ! "$PYTHON" -u -m verl.trainer.siop.main "${TRAINER_ARGS[@]}" "${resume[@]}" \
    "trainer.experiment_name=$EXPERIMENT" "trainer.logger=[console]" \
    trainer.val_only=true trainer.val_before_train=true \
    "trainer.default_local_dir=$OUT_DIR/checkpoints" "trainer.validation_data_dir=$OUT_DIR/validation" \
    "$@" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    die "evaluation failed; the whole log is $log"
fi
"$PYTHON" -m verl.trainer.siop.report "$OUT_DIR/validation"
