#!/usr/bin/env bash
# Says whether a training run would start, one line per check: ok, warning, or failed with what to do. Starts nothing.
#
#   MODEL_PATH=Qwen/Qwen3-4B TRAIN_FILE=train.parquet VAL_FILE=test.parquet bash doctor.sh [HYDRA_OVERRIDE ...]
#   bash doctor.sh                                         the toy world, if none of these is set
#
# It takes the variables and overrides of train_siop.sh; retriever and scorer should be up. Exit code 0 if a run would
# start.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}" train
trainer_words train "$@"
variables check train || exit 1
pick_python

# The doctor has lines of its own for these, and goes on after them.
check_torch() { :; }
check_gpu_memory() { :; }

export EXPERIMENT_NAME=${EXPERIMENT_NAME:-siop_main} OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/siop}
trainer_args train "$([[ -n ${MODEL_PATH:-}${TRAIN_FILE:-}${VAL_FILE:-}${DATA_DIR:-} ]] || echo toy)"
exec "$PYTHON" -W ignore -m verl.trainer.siop.doctor "${TRAINER_ARGS[@]}" ${OVERRIDES[@]+"${OVERRIDES[@]}"}
