#!/usr/bin/env bash
# Evaluates a policy by sampling and prints EM, F1, turns and response tokens. The retriever must be up.
#
#   bash eval_siop.sh CHECKPOINT [--toy-seed N] [-- HYDRA_OVERRIDE ...]
#
# CHECKPOINT is a transformers model, or a folder global_step_N of train_siop.sh. Folders without a transformers copy of
# the weights (actor/huggingface/*.safetensors) need MODEL_PATH, the model that training started from.
#   --toy-seed N   evaluate on facts and names of the toy world generated with seed N (own retriever, stopped at the end)
#
# Environment: as train_siop.sh (--help), but
#   VAL_FILES        evaluation data; default: the toy world's (TOY_DIR)
#   EXPERIMENT       name of the evaluation (eval)
#   OUT_DIR          metrics and rollouts (runs/$EXPERIMENT)
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
[[ -d $checkpoint ]] || die "CHECKPOINT=$checkpoint: no such folder"
pick_python

EXPERIMENT=${EXPERIMENT:-eval}
OUT_DIR=${OUT_DIR:-runs/$EXPERIMENT}
LOG_DIR=${LOG_DIR:-logs}
mkdir -p "$OUT_DIR" "$LOG_DIR"
checkpoint=${checkpoint%/}
resume=(trainer.resume_mode=disable)
if [[ -f $checkpoint/config.json ]]; then
    MODEL_PATH=$checkpoint
elif compgen -G "$checkpoint/actor/huggingface/*.safetensors" >/dev/null; then
    MODEL_PATH=$checkpoint/actor/huggingface
elif [[ -d $checkpoint/actor ]]; then
    [[ -n ${MODEL_PATH:-} ]] || die "$checkpoint holds sharded weights only: set MODEL_PATH to the model that training started from"
    resume=(trainer.resume_mode=resume_path "trainer.resume_from_path=$checkpoint")
else
    die "CHECKPOINT=$checkpoint is neither a transformers model (config.json) nor a folder global_step_N (actor/)"
fi

if [[ -n $toy_seed ]]; then
    TOY_DIR=${TOY_DIR:-runs/toy}
    world=$([[ $(toy_settings "$TOY_DIR") == toy ]] && echo two_hop || echo chains)
    TOY_DIR+=-seed-$toy_seed
    "$PYTHON" -m examples.toy_world.build --data-only --world "$world" --seed "$toy_seed" --out "$TOY_DIR"
    port=$(free_port)
    export RETRIEVER_URL=http://127.0.0.1:$port/retrieve
    service=(env "RETRIEVER_CORPUS_FILE=$TOY_DIR/corpus.jsonl" "RETRIEVER_PORT=$port" "LOG_DIR=$OUT_DIR/logs" bash launch_retriever.sh)
    trap '"${service[@]}" stop' EXIT
    "${service[@]}"
fi
trainer_args "${VAL_FILES:-}"
rm -rf "$OUT_DIR/validation"
log=$LOG_DIR/eval-$EXPERIMENT.log
say "evaluating $checkpoint on $DEVICE; log: $log"
if ! "$PYTHON" -u -m verl.trainer.siop.main "${TRAINER_ARGS[@]}" "${resume[@]}" \
    "trainer.experiment_name=$EXPERIMENT" trainer.val_only=true trainer.val_before_train=true "trainer.logger=[console]" \
    "trainer.default_local_dir=$OUT_DIR/checkpoints" "trainer.validation_data_dir=$OUT_DIR/validation" \
    "$@" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    die "evaluation failed; the whole log is $log"
fi
"$PYTHON" -m verl.trainer.siop.report "$OUT_DIR/validation"
