#!/usr/bin/env bash
# Trains a policy with SIOP. Retriever and scorer must be up (launch_retriever.sh, launch_siop_scorer.sh).
#
#   MODEL_PATH=Qwen/Qwen3-4B TRAIN_FILE=train.parquet VAL_FILE=test.parquet bash train_siop.sh [HYDRA_OVERRIDE ...]
#   MODEL_PATH=Qwen/Qwen3-4B DATA_DIR=data/searchr1 bash train_siop.sh        of python -m verl.utils.siop.data build
#   bash train_siop.sh                                     on the toy world, if none of these is set
#   bash train_siop.sh ablation=release algorithm.siop_lambda=0.3
#   bash train_siop.sh --dry-run                           prints the command and the configuration, starts nothing
#
# It runs in the foreground; Ctrl-C stops it. The same command goes on from the last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}" train
trainer_words train "$@"
variables check train || exit 1
pick_python

export EXPERIMENT_NAME=${EXPERIMENT_NAME:-siop_main} OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/siop}
LOG_DIR=${LOG_DIR:-logs}
trainer_args train "$([[ -n ${MODEL_PATH:-}${TRAIN_FILE:-}${VAL_FILE:-}${DATA_DIR:-} ]] || echo toy)"
log=$LOG_DIR/siop_train.log
[[ $EXPERIMENT_NAME == siop_main ]] || log=$LOG_DIR/siop_train-$EXPERIMENT_NAME.log
export TENSORBOARD_DIR=${TENSORBOARD_DIR:-$OUTPUT_DIR/tensorboard}
command=("$PYTHON" -u scripts/run_module.py verl.trainer.siop.main "${TRAINER_ARGS[@]}" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
if [[ -n $DRY_RUN ]]; then
    dry_run train "${command[@]}"
    exit
fi

mkdir -p "$OUTPUT_DIR" "$LOG_DIR"
# Earlier parts of the run stay in the log.
echo "=== $(date '+%F %T') training $MODEL_PATH into $OUTPUT_DIR ===" >>"$log"
# The script becomes the trainer, so that a signal reaches it. It writes into the log, and here what people want to see.
exec env SIOP_CONSOLE=people SIOP_LOG="$log" "${command[@]}"
