#!/usr/bin/env bash
# The whole method on a laptop CPU: a made-up world, a small search agent, SIOP training without labels, evaluation.
# About ten minutes the first time; a second call reuses what is there. Ctrl-C stops everything it started.
#
#   bash quickstart.sh [--method siop|policy|release|grpo|empo|ttrl|...] [--seed N]
#   bash quickstart.sh --game sudoku|tictactoe|minesweeper [--method vpr|vpr_loo|vpr_return|grpo] [--seed N]
#
#   --game     a small game in place of the world: an oracle checks every turn, so there is no retriever and no scorer
#   --method   with a game: vpr (default), vpr_loo, vpr_return: by the oracle's scores of turns; grpo: by the outcome.
#              Else: siop (default); policy: the policy is its own scorer; release: the first release's formulas; empo, ttrl:
#              rewards from cluster sizes alone; grpo, igpo: use labels, the others do not; and every other
#              config/ablation/METHOD.yaml
#   --seed     seed of data order and sampling (1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

method='' seed=1 game=''
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) help_if_asked "${BASH_SOURCE[0]}" "$1" quickstart ;;
        --game) game=${2:?--game needs a name} && shift 2 ;;
        --method) method=${2:?--method needs a name} && shift 2 ;;
        --seed) seed=${2:?--seed needs a number} && shift 2 ;;
        *) die "unknown argument '$1'; see bash quickstart.sh --help" ;;
    esac
done
[[ -z $game || $game =~ ^(sudoku|tictactoe|minesweeper)$ ]] ||
    die "--game $game: choose one of sudoku, tictactoe, minesweeper"
method=${method:-${game:+vpr}} method=${method:-siop}
if [[ -n $game && ! $method =~ ^(vpr|vpr_loo|vpr_return|grpo)$ ]]; then
    die "--method $method with --game $game: choose one of vpr, vpr_loo, vpr_return, grpo"
elif [[ -z $game && $method =~ ^vpr ]]; then
    die "--method $method needs turns that are verified: name a game, --game sudoku, tictactoe or minesweeper"
fi
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
# What there is to learn from: a toy world, or a game.
source=$TOY_DIR described=$TOY_DIR/meta.json named="toy world" phases=6 what=questions
if [[ -n $game ]]; then
    source=${GAME_DIR:-runs/games/$game}
    source=${source%/}
    described=$source/build.json named=game phases=5 what=boards world=${source##*/}-
fi
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
    say "[$phase_number/$phases] $*"
}
finished() { say "      done in $((SECONDS - phase_start)) s"; }

phase "environment: .venv with the project and its CPU requirements"
[[ -n ${CONDA_ENV:-} ]] || run bash scripts/setup_env.sh
[[ -n ${CONDA_ENV:-} ]] || unset VIRTUAL_ENV
pick_python
mkdir -p "$LOG_DIR"
finished

if [[ -n $game ]]; then
    phase "$game in $source: boards, and a model warm-started on a faulty scripted agent"
    run "$PYTHON" -m examples.games.build --keep --game "$game" --out "$source" --threads "$(getconf _NPROCESSORS_ONLN)"
else
    phase "toy world in $TOY_DIR: facts, questions, and a model warm-started on an imperfect scripted agent"
    run "$PYTHON" -m examples.toy_world.build --keep --out "$TOY_DIR" --threads "$(getconf _NPROCESSORS_ONLN)"
fi
# Results and checkpoints of one world are neither reused nor gone on from in another.
if [[ ! -f $out/world.json ]]; then
    cp "$described" "$out/world.json"
elif ! cmp -s "$described" "$out/world.json"; then
    die "OUTPUT_DIR=$out holds results of another $named than $source (its ${described##*/} then: $out/world.json);" \
        "choose another OUTPUT_DIR, or remove that folder"
fi
finished

# What the launchers are told of a game; a toy world they find by TOY_DIR.
data=() overrides=()
if [[ -n $game ]]; then
    data=("DATA_DIR=$source") overrides=(experiment=games)
else
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
fi

# evaluate NAME CHECKPOINT: into $out/NAME, unless it is there and newer than the checkpoint.
evaluate() {
    if [[ -f $out/$1/validation/metrics.json && $out/$1/validation/metrics.json -nt $2 ]]; then
        say "      reusing $out/$1"
    else
        EXPERIMENT_NAME=$1 OUTPUT_DIR=$out/$1 run env ${data[@]+"${data[@]}"} \
            bash eval_siop.sh "$2" ${overrides[@]+"${overrides[@]}"}
    fi
}

phase "evaluation before training, on held-out $what"
evaluate before "$source/model"
finished

labels=", no labels"
[[ -z $game && ! $method =~ ^(grpo|igpo)$ ]] || labels=
phase "training: $method, $steps steps of 8 $what x 8 rollouts$labels"
checkpoint=$out/global_step_$steps
train_start=$SECONDS
if [[ -d $checkpoint/actor && $checkpoint -nt $described ]]; then
    say "      reusing $checkpoint"
else
    log=$LOG_DIR/siop_train-$method.log
    log_start=$(log_length "$log")
    env ${data[@]+"${data[@]}" "MODEL_PATH=$source/model"} \
        "EXPERIMENT_NAME=$method" "OUTPUT_DIR=$out" SAVE_FREQ=20 bash train_siop.sh \
        ${overrides[@]+"${overrides[@]}"} "ablation=$method" "trainer.total_training_steps=$steps" trainer.max_actor_ckpt_to_keep=1 >/dev/null 2>&1 &
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

phase "evaluation after training, on the same $what"
evaluate after "$checkpoint"
finished

if [[ -n $game ]]; then
    report=(examples.games.report)
else
    say "stopping retriever and scorer"
    stop_services
    report=(examples.toy_world.report --data "$TOY_DIR/eval.parquet")
fi
echo
"$PYTHON" -m "${report[@]}" --title "$method, seed $seed, $steps steps" \
    --before "$out/before/validation" --after "$out/after/validation" | tee "$out/table.txt"
page=$out/rollouts.html
run "$PYTHON" -m siop_inspector "$out" --export "$page" 2>"$LOG_DIR/inspector.log" || {
    tail -n 5 "$LOG_DIR/inspector.log" >&2
    die "the page over the rollouts could not be written; the whole log is $LOG_DIR/inspector.log"
}
echo "seconds: training $training_seconds, all $SECONDS"
echo "checkpoint:       $checkpoint"
echo "logs:             $LOG_DIR"
echo "TensorBoard:      $PYTHON -m tensorboard.main --logdir $out/tensorboard"
echo "dumped rollouts:  $out/rollouts"
echo "turn credit:      $page, in a browser; or serve it: $PYTHON -m siop_inspector $out"
