#!/usr/bin/env bash
# The whole method on a laptop CPU: a made-up world, a small search agent, SIOP training without labels, evaluation.
# About ten minutes the first time; a second call reuses what is there. Ctrl-C stops everything it started.
#
#   bash quickstart.sh [--method siop|policy|release|grpo|empo|ttrl|...] [--seed N]
#
#   --method   siop (default); policy: the policy is its own scorer; release: the first release's formulas; empo, ttrl:
#              rewards from cluster sizes alone; grpo, igpo: use labels, the others do not; and every other
#              config/ablation/METHOD.yaml
#   --seed     seed of data order and sampling (1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

method=siop seed=1
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) help_if_asked "${BASH_SOURCE[0]}" "$1" quickstart ;;
        --method) method=${2:?--method needs a name} && shift 2 ;;
        --seed) seed=${2:?--seed needs a number} && shift 2 ;;
        *) die "unknown argument '$1'; see bash quickstart.sh --help" ;;
    esac
done
if [[ ! $method =~ ^[a-z0-9_]+$ || ! -f config/ablation/$method.yaml ]]; then
    methods=(config/ablation/*.yaml)
    methods=("${methods[@]##*/}")
    die "--method $method: choose one of ${methods[*]%.yaml}"
fi
check_number seed 0 "$MAX_INT" "--seed "
variables check quickstart || exit 1
steps=${QUICKSTART_STEPS:-60}
TOY_DIR=${TOY_DIR:-runs/toy}
export TOY_DIR=${TOY_DIR%/}
world=${TOY_DIR##*/}-
[[ $TOY_DIR != runs/toy ]] || world=
out=${OUTPUT_DIR:-runs/quickstart/$world$method-seed$seed-$steps}
# What is set for other runs is not for these services and this training.
for name in OUTPUT_DIR $(variables foreign quickstart); do unset "$name"; done
stop_grace=${SIOP_STOP_GRACE_S:-30} stop_grace=${stop_grace%.*}
export LOG_DIR=$out/logs SEED=$seed N_GPUS_PER_NODE=0 SIOP_NLI_MODEL=none EVAL_TEMPERATURE=1

# Job control gives each phase a process group of its own, which is stopped as a whole.
set -m
child=
cleanup() {
    local status=$?
    trap - EXIT
    if [[ -n $child ]]; then
        # A training ends what it started, after its step where that can be saved; a second signal reaches it at once.
        trap 'kill -TERM "$child" 2>/dev/null || true' INT TERM HUP
        kill -TERM "$child" 2>/dev/null || true
        await_end "$child" "$((stop_grace + 30))"
        kill -TERM -- "-$child" 2>/dev/null || true
        await_end "-$child" 10
        kill -KILL -- "-$child" 2>/dev/null || true
    fi
    trap '' INT TERM HUP
    stop_services
    exit "$status"
}
# await_end PID SECONDS: a negative PID is a process group.
await_end() {
    local end=$((SECONDS + $2))
    while kill -0 -- "$1" 2>/dev/null && ((SECONDS < end)); do sleep 0.1; done
}
stop_services() {
    [[ -z ${SIOP_PORT:-} ]] || bash launch_siop_scorer.sh stop >/dev/null 2>&1 || true
    [[ -z ${RETRIEVER_PORT:-} ]] || bash launch_retriever.sh stop >/dev/null 2>&1 || true
}
trap cleanup EXIT
stopping="stopping; a training step that ends within $stop_grace s is saved, a second Ctrl-C ends it at once"
trap 'say "$stopping"; exit 130' INT
trap 'say "$stopping"; exit 143' TERM HUP

run() {
    "$@" &
    child=$!
    local status=0
    wait "$child" || status=$?
    child=
    return "$status"
}

phase_number=0 phase_start=$SECONDS
phase() {
    phase_number=$((phase_number + 1)) phase_start=$SECONDS
    say "[$phase_number/6] $*"
}
finished() { say "      done in $((SECONDS - phase_start)) s"; }

phase "environment: .venv with the project and its CPU requirements"
[[ -n ${CONDA_ENV:-} ]] || run bash scripts/setup_env.sh
[[ -n ${CONDA_ENV:-} ]] || unset VIRTUAL_ENV
pick_python
mkdir -p "$LOG_DIR"
finished

phase "toy world in $TOY_DIR: facts, questions, and a model warm-started on an imperfect scripted agent"
run "$PYTHON" -m examples.toy_world.build --keep --out "$TOY_DIR" --threads "$(getconf _NPROCESSORS_ONLN)"
# Results and checkpoints of one world are neither reused nor gone on from in another.
if [[ ! -f $out/world.json ]]; then
    cp "$TOY_DIR/meta.json" "$out/world.json"
elif ! cmp -s "$TOY_DIR/meta.json" "$out/world.json"; then
    die "OUTPUT_DIR=$out holds results of another toy world than $TOY_DIR (its meta.json then: $out/world.json);" \
        "choose another OUTPUT_DIR, or remove that folder"
fi
finished

scorer=$TOY_DIR/model
[[ $method != policy ]] || scorer=none
phase "services: retriever (BM25) and scorer (language model: $scorer)"
RETRIEVER_PORT=$(free_port)
SIOP_PORT=$(free_port)
export RETRIEVER_PORT SIOP_PORT
export RETRIEVER_CORPUS_FILE=$TOY_DIR/corpus.jsonl RETRIEVER_URL=http://127.0.0.1:$RETRIEVER_PORT/retrieve
export SIOP_MODEL=$scorer SIOP_NUM_GPUS=0 SIOP_SCORER_URL=http://127.0.0.1:$SIOP_PORT
run bash launch_retriever.sh
run bash launch_siop_scorer.sh
finished

# evaluate NAME CHECKPOINT: into $out/NAME, unless it is there and newer than the checkpoint.
evaluate() {
    if [[ -f $out/$1/validation/metrics.json && $out/$1/validation/metrics.json -nt $2 ]]; then
        say "      reusing $out/$1"
    else
        EXPERIMENT_NAME=$1 OUTPUT_DIR=$out/$1 run bash eval_siop.sh "$2"
    fi
}

phase "evaluation before training, on held-out questions"
evaluate before "$TOY_DIR/model"
finished

labels=", no labels"
[[ ! $method =~ ^(grpo|igpo)$ ]] || labels=
phase "training: $method, $steps steps of 8 questions x 8 rollouts$labels"
checkpoint=$out/global_step_$steps
train_start=$SECONDS
if [[ -d $checkpoint/actor && $checkpoint -nt $TOY_DIR/meta.json ]]; then
    say "      reusing $checkpoint"
else
    log=$LOG_DIR/siop_train-$method.log
    log_start=$(log_length "$log")
    EXPERIMENT_NAME=$method OUTPUT_DIR=$out SAVE_FREQ=20 bash train_siop.sh \
        "ablation=$method" "trainer.total_training_steps=$steps" trainer.max_actor_ckpt_to_keep=1 >/dev/null 2>&1 &
    child=$!
    say "      log: $log"
    run_watch "$log" "$log_start" "$child" "$steps"
    status=0
    wait "$child" || status=$?
    child=
    if [[ $status -ne 0 ]]; then
        [[ ! -f $log ]] || tail -c "+$((log_start + 1))" "$log" | tail -n 20 >&2
        die "training failed; the whole log is $log"
    fi
fi
training_seconds=$((SECONDS - train_start))
finished

phase "evaluation after training, on the same questions"
evaluate after "$checkpoint"
finished

say "stopping retriever and scorer"
stop_services
echo
"$PYTHON" -m examples.toy_world.report --data "$TOY_DIR/eval.parquet" --title "$method, seed $seed, $steps steps" \
    --before "$out/before/validation" --after "$out/after/validation" | tee "$out/table.txt"
page=$out/rollouts.html
run "$PYTHON" -m verl.utils.siop.inspector "$out" --export "$page" 2>"$LOG_DIR/inspector.log" || {
    tail -n 5 "$LOG_DIR/inspector.log" >&2
    die "the page over the rollouts could not be written; the whole log is $LOG_DIR/inspector.log"
}
echo "seconds: training $training_seconds, all $SECONDS"
echo "checkpoint:       $checkpoint"
echo "logs:             $LOG_DIR"
echo "TensorBoard:      $PYTHON -m tensorboard.main --logdir $out/tensorboard"
echo "dumped rollouts:  $out/rollouts"
echo "turn credit:      $page, in a browser; or serve it: $PYTHON -m verl.utils.siop.inspector $out"
