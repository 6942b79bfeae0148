#!/usr/bin/env bash
# Evaluates a policy, greedily unless told otherwise, and prints EM and F1 with their intervals, and what the rollouts
# did. The retriever must be up. OUTPUT_DIR/validation holds a line for each sample (questions.jsonl) and all that the
# numbers depend on (manifest.json); docs/evaluation.md describes both.
#
#   MODEL_PATH=Qwen/Qwen3-4B CHECKPOINT_PATH=checkpoints/siop/global_step_100 VAL_FILE=test.parquet bash eval_siop.sh
#   EVAL_N=4 EVAL_TEMPERATURE=1 bash eval_siop.sh CHECKPOINT         # avg@4 and pass@4
#   bash eval_siop.sh CHECKPOINT [--toy-seed N] [--dry-run] [HYDRA_OVERRIDE ...]
#   python -m verl.trainer.siop.report compare OUTPUT_DIR_A OUTPUT_DIR_B    # paired differences of two evaluations
#
# CHECKPOINT is a transformers model (a folder, or a hub id such as Qwen/Qwen3-4B), or a folder global_step_N of
# train_siop.sh. Without CHECKPOINT the model of MODEL_PATH is evaluated. Checkpoints without a transformers copy of the
# weights (actor/huggingface/*.safetensors) need MODEL_PATH, the model that training started from.
#   --toy-seed N   evaluate on facts and names of a toy world generated with seed N (own retriever, stopped at the end)
#   --dry-run      print the command and the configuration, start nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}" eval
# Only a checkpoint as an argument leaves room for the toy world.
toy=$([[ -n ${MODEL_PATH:-}${TRAIN_FILE:-}${VAL_FILE:-}${DATA_DIR:-}${CHECKPOINT_PATH:-} ]] || echo toy)
checkpoint=${CHECKPOINT_PATH:-} toy_seed='' words=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --toy-seed)
            [[ $# -gt 1 ]] || die "--toy-seed needs a number"
            toy_seed=$2
            shift
            ;;
        -* | *=*) words+=("$1") ;;
        *)
            [[ -z $checkpoint ]] || die "two checkpoints are named: $checkpoint and $1"
            checkpoint=$1
            ;;
    esac
    shift
done
trainer_words eval ${words[@]+"${words[@]}"}
variables check eval || exit 1
if [[ -n $toy_seed ]]; then
    check_number toy_seed 0 "$MAX_INT" "--toy-seed "
    [[ -z ${VAL_FILE:-} ]] ||
        die "VAL_FILE=$VAL_FILE and --toy-seed $toy_seed name different data: unset VAL_FILE or leave --toy-seed out"
    [[ -z ${DATA_DIR:-} ]] ||
        die "DATA_DIR=$DATA_DIR and --toy-seed $toy_seed name different data: unset DATA_DIR or leave --toy-seed out"
    toy=toy
fi
checkpoint=${checkpoint:-${MODEL_PATH:-}}
[[ -n $checkpoint ]] || die "which model? bash eval_siop.sh CHECKPOINT, CHECKPOINT_PATH or MODEL_PATH; see --help"
from_hub=
if [[ ! -d $checkpoint ]]; then
    # A path into a folder that exists is a mistyped path.
    [[ $checkpoint =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ && ! -e $checkpoint && ! -e ${checkpoint%%/*} ]] ||
        die "CHECKPOINT=$checkpoint: no such folder, nor a model id ORG/NAME of the hub"
    from_hub=1
fi
pick_python

export EXPERIMENT_NAME=${EXPERIMENT_NAME:-siop_eval} OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/siop_eval}
export ROLLOUT_GPU_MEM=${ROLLOUT_GPU_MEM:-0.6}
LOG_DIR=${LOG_DIR:-logs}
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

if [[ -n $toy_seed && -z $DRY_RUN ]]; then
    TOY_DIR=${TOY_DIR:-runs/toy}
    TOY_DIR=${TOY_DIR%/}
    world=$([[ $(toy_settings "$TOY_DIR") == toy ]] && echo two_hop || echo chains)
    TOY_DIR+=-seed-$toy_seed
    "$PYTHON" -m examples.toy_world.build --data-only --world "$world" --seed "$toy_seed" --out "$TOY_DIR"
    forget_retriever
    port=$(free_port)
    export RETRIEVER_URL=http://127.0.0.1:$port/retrieve
    service=(env "RETRIEVER_CORPUS_FILE=$TOY_DIR/corpus.jsonl" "RETRIEVER_PORT=$port" "LOG_DIR=$OUTPUT_DIR/logs"
        bash launch_retriever.sh)
    trap '"${service[@]}" stop' EXIT
    "${service[@]}"
fi
trainer_args eval "$toy"
log=$LOG_DIR/siop_eval.log
[[ $EXPERIMENT_NAME == siop_eval ]] || log=$LOG_DIR/siop_eval-$EXPERIMENT_NAME.log
# Takes the place of the old one when it is complete.
results=$OUTPUT_DIR/validation new=$OUTPUT_DIR/validation.new old=$OUTPUT_DIR/validation.old
command=("$PYTHON" -u scripts/run_module.py verl.trainer.siop.main "${TRAINER_ARGS[@]}" "${resume[@]}" "trainer.logger=[console]"
    trainer.val_only=true trainer.val_before_train=true "trainer.validation_data_dir=$new"
    ${OVERRIDES[@]+"${OVERRIDES[@]}"})
if [[ -n $DRY_RUN ]]; then
    dry_run eval "${command[@]}"
    exit
fi
mkdir -p "$OUTPUT_DIR" "$LOG_DIR"
# Of two evaluations at once each would remove what the other writes.
exec 8>"$OUTPUT_DIR/.evaluation.lock"
flock -n 8 || die "OUTPUT_DIR=$OUTPUT_DIR is the folder of an evaluation that is running; wait, or choose another one"
# Killed between the two names.
[[ -e $results || ! -d $old ]] || mv "$old" "$results"
rm -rf "$new" "$old"
say "evaluating $checkpoint${from_hub:+ of the model hub} on $DEVICE; log: $log"
: >"$log"
# In the background, so that a signal to this script alone reaches it too; with Ctrl-C as it is, which bash turns off there.
(
    trap - INT
    exec env SIOP_CONSOLE=people SIOP_LOG="$log" "${command[@]}" 8>&-
) &
child=$! status=0
for signal in INT TERM HUP; do
    # shellcheck disable=SC2064
    trap "kill -$signal $child 2>/dev/null || true" "$signal"
done
wait "$child" || status=$?
# A signal ends the wait, not the evaluation.
while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
done
trap - INT TERM HUP
if [[ $status -ne 0 ]]; then
    [[ ! -d $results ]] || say "the earlier evaluation in $results is as it was"
    # What a signal or an error of its own ended has said so.
    [[ $status == @(1|129|130|143) ]] || die "the evaluation ended with exit status $status; the whole log is $log"
    exit "$status"
fi
[[ ! -d $results ]] || mv "$results" "$old"
mv "$new" "$results"
rm -rf "$old"
"$PYTHON" -m verl.trainer.siop.report "$results"
