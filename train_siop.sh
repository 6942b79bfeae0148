#!/usr/bin/env bash
# Trains an agent with SIOP in verl's PPO trainer. The retriever and the scorer must be up (launch_retriever.sh,
# launch_siop_scorer.sh). Runs in the foreground; Ctrl-C stops it, the same command resumes from the last checkpoint.
#
#   bash train_siop.sh [-- HYDRA_OVERRIDE ...]
#   MODEL_PATH=Qwen/Qwen3-4B TRAIN_FILES=a.parquet VAL_FILES=b.parquet bash train_siop.sh -- algorithm.siop_lambda=0.3
#
# Environment:
#   TRAIN_FILES      parquet file(s) in verl's RL format, several as [a.parquet,b.parquet]; default: the toy world's
#                    (TOY_DIR), with its model, tool and settings (config/experiment/toy.yaml)
#   VAL_FILES        the same for validation
#   MODEL_PATH       policy to train, a transformers model
#   TOY_DIR          the toy world (runs/toy)
#   EXPERIMENT       name of the run (siop)
#   OUT_DIR          checkpoints and rollouts (runs/$EXPERIMENT)
#   TENSORBOARD_DIR  TensorBoard files ($OUT_DIR/tensorboard)
#   LOG_DIR          place of train-$EXPERIMENT.log, which grows with each call (logs)
#   TOOL_CONFIG      tool configuration (config/local_search_tool_config.yaml)
#   RETRIEVER_URL    the retriever's address (http://127.0.0.1:8000/retrieve)
#   SIOP_SCORER_URL  the scorer's address (http://127.0.0.1:8390)
#   SIOP_API_TOKEN   bearer token that the scorer asks for (none)
#   N_GPUS           GPUs per node (those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists; 0 means CPU)
#   NNODES           nodes (1); for more, start Ray on them and set RAY_ADDRESS
#   RAY_ADDRESS      Ray cluster to join (none: a private Ray)
#   OMP_NUM_THREADS  threads of each process on a CPU (1)
#   SEED             seed of data order and sampling (1)
#   CONDA_ENV        conda environment to run in (default: active Python, or .venv)
#   SERPER_API_KEY   key of the web search tool, if TOOL_CONFIG is config/serper_tool_config.yaml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}"
case ${1:-} in
    "" | --) [[ $# -eq 0 ]] || shift ;;
    *) die "unknown argument '$1'; Hydra overrides go after --, see bash train_siop.sh --help" ;;
esac
check_trainer_numbers
check_number NNODES 1 65536
pick_python

EXPERIMENT=${EXPERIMENT:-siop}
OUT_DIR=${OUT_DIR:-runs/$EXPERIMENT}
LOG_DIR=${LOG_DIR:-logs}
trainer_args "${TRAIN_FILES:-}"
mkdir -p "$OUT_DIR" "$LOG_DIR"
log=$LOG_DIR/train-$EXPERIMENT.log
export TENSORBOARD_DIR=${TENSORBOARD_DIR:-$OUT_DIR/tensorboard}

say "training $MODEL_PATH on $DEVICE; Ctrl-C stops it"
say "log: $log   checkpoints: $OUT_DIR/checkpoints   TensorBoard: $TENSORBOARD_DIR   rollouts: $OUT_DIR/rollouts"
# The script becomes the trainer, so that a signal reaches it; tee outlives Ctrl-C, or the last lines would be lost.
# Earlier parts of the run stay in the log.
exec > >(tee -i -a "$log") 2>&1
echo "=== $(date '+%F %T') training $MODEL_PATH into $OUT_DIR ==="
exec "$PYTHON" -u -m verl.trainer.siop.main "${TRAINER_ARGS[@]}" \
    "trainer.experiment_name=$EXPERIMENT" \
    "trainer.default_local_dir=$OUT_DIR/checkpoints" \
    "trainer.rollout_data_dir=$OUT_DIR/rollouts" \
    "trainer.nnodes=${NNODES:-1}" \
    "$@"
