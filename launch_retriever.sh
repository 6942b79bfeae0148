#!/usr/bin/env bash
# Starts the retriever service in the background and waits until it answers. The index is built first, in the foreground
# and only once; what was interrupted goes on at the next call.
#
#   RETRIEVER_CORPUS_DIR=/data bash launch_retriever.sh [start] [--dry-run] [-- SERVER_OPTION ...]
#   RETRIEVER_CORPUS_FILE=/data/wiki-18.jsonl RETRIEVER_NAME=e5 bash launch_retriever.sh
#   RETRIEVER_INDEX_DIR=/data/wiki-18.jsonl.flat.hnsw_sq8 bash launch_retriever.sh     an index as it is, see docs/retrieval.md
#   bash launch_retriever.sh                   the toy world's corpus, if no corpus is named
#   bash launch_retriever.sh stop
#   bash launch_retriever.sh status            exit status 0 if it is healthy
#
# RETRIEVER_NAME: bm25, by words; e5, by the vectors of an encoder, which are those of RETRIEVER_INDEX_FILE if that is
# there, and else are computed. Not named, it is e5 where such a file is, and bm25 elsewhere.
#
# A server of your own, as Search-R1's retrieval_server.py:
#   RETRIEVAL_SERVER_SCRIPT=retrieval_server.py RETRIEVER_CORPUS_DIR=/data bash launch_retriever.sh
#
# --dry-run prints the command and starts nothing. Options after -- go to the server as they are;
# bash launch_retriever.sh start -- --help lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh
# shellcheck source=scripts/service.sh
source scripts/service.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}" retriever
service_arguments "${BASH_SOURCE[0]}" "$@"
variables check retriever || exit 1

name=retrieval_server
host=${RETRIEVER_HOST:-127.0.0.1}
port=${RETRIEVER_PORT:-8000}
address=$(service_address "$host")
timeout=${RETRIEVER_START_TIMEOUT:-1800}
topk=${RETRIEVER_TOPK:-3}
corpus=${RETRIEVER_CORPUS_FILE:-${RETRIEVER_CORPUS_DIR:+$RETRIEVER_CORPUS_DIR/wiki-18.jsonl}}
script=${RETRIEVAL_SERVER_SCRIPT:-}
CONDA_ENV=${RETRIEVER_CONDA_ENV:-${CONDA_ENV:-}}
# Of these the server looks after an index that is there already; it takes no time.
SMALL_CORPUS=$((100 * 2 ** 20))
BUILD=()
health=http://$address:$port/health
[[ -z $script ]] || health=tcp://$address:$port

# Sets COMMAND to the user's own server.
own_server() {
    local index=${RETRIEVER_INDEX_FILE:-${RETRIEVER_CORPUS_DIR:+$RETRIEVER_CORPUS_DIR/e5_Flat.index}}
    [[ -z ${RETRIEVER_GPUS:-} ]] || export CUDA_VISIBLE_DEVICES=$RETRIEVER_GPUS
    [[ -f $script ]] || die "RETRIEVAL_SERVER_SCRIPT=$script: there is no such file"
    [[ -n $index && -n $corpus ]] ||
        die "RETRIEVAL_SERVER_SCRIPT=$script needs an index and a corpus: set RETRIEVER_CORPUS_DIR, or" \
            "RETRIEVER_INDEX_FILE and RETRIEVER_CORPUS_FILE"
    [[ -e $index ]] || die "RETRIEVER_INDEX_FILE=$index: there is no such file"
    [[ -f $corpus ]] || die "RETRIEVER_CORPUS_FILE=$corpus: there is no such file"
    COMMAND=("$PYTHON" "$script" --index_path "$index" --corpus_path "$corpus" --topk "$topk"
        --retriever_name "${RETRIEVER_NAME:-e5}" --retriever_model "${RETRIEVER_MODEL:-intfloat/e5-base-v2}")
    [[ ${RETRIEVER_FAISS_GPU:-$(($(count_gpus) > 0))} != 1 ]] || COMMAND+=(--faiss_gpu)
    what="$script over $corpus"
}

# Sets COMMAND to the server of this project, and BUILD to what makes its index; BUILD is empty where nothing has to be
# made.
our_server() {
    local toy=${TOY_DIR:-runs/toy} module=verl.utils.siop.retriever file=${RETRIEVER_INDEX_FILE:-} kind unused
    local folder=${RETRIEVER_INDEX_DIR:-} encoder=(${RETRIEVER_MODEL:+--model "$RETRIEVER_MODEL"})
    [[ $topk -le 100 ]] || die "RETRIEVER_TOPK=$topk is not allowed: a whole number from 1 to 100"
    [[ -n $file || -z ${RETRIEVER_CORPUS_DIR:-} || ! -f $RETRIEVER_CORPUS_DIR/e5_Flat.index ]] ||
        file=$RETRIEVER_CORPUS_DIR/e5_Flat.index
    kind=${RETRIEVER_NAME:-$([[ -n $file ]] && echo e5 || echo bm25)}
    [[ $kind == bm25 || $kind == e5 ]] ||
        die "RETRIEVER_NAME=$kind is not allowed: bm25 or e5 (another encoder: RETRIEVER_NAME=e5 RETRIEVER_MODEL=…);" \
            "name another server with RETRIEVAL_SERVER_SCRIPT"
    if [[ $kind == bm25 ]]; then
        [[ -z ${RETRIEVER_NAME:-} ]] || file=
        for unused in RETRIEVER_MODEL RETRIEVER_FAISS_GPU RETRIEVER_GPUS ${RETRIEVER_NAME:+RETRIEVER_INDEX_FILE}; do
            [[ -z ${!unused:-} || -f $folder/manifest.json ]] ||
                die "$unused=${!unused} has no effect: it is for dense retrieval (RETRIEVER_NAME=e5) or a server of your" \
                    "own (RETRIEVAL_SERVER_SCRIPT); BM25 keeps its index in RETRIEVER_INDEX_DIR and uses no GPU"
        done
    fi
    [[ -z ${RETRIEVER_GPUS:-} ]] || export CUDA_VISIBLE_DEVICES=$RETRIEVER_GPUS
    COMMAND=("$PYTHON" -m "$module.server") BUILD=()
    without_plugins
    if [[ -f $folder/manifest.json && -z ${RETRIEVER_NAME:-}$file$corpus ]]; then
        what="the index in $folder"
        COMMAND+=(--index "$folder" ${encoder[@]+"${encoder[@]}"})
    else
        if [[ -z $corpus ]]; then
            corpus=$toy/corpus.jsonl
            [[ -f $corpus ]] ||
                die "no corpus named and no toy world in $toy: set RETRIEVER_CORPUS_FILE, or build it with:" \
                    "$PYTHON -m examples.toy_world.build --out $toy"
        fi
        [[ -f $corpus ]] || die "RETRIEVER_CORPUS_FILE=$corpus: there is no such file"
        COMMAND+=(--corpus "$corpus")
        if [[ $kind == bm25 ]]; then
            what="BM25 over $corpus"
            COMMAND+=(${folder:+--index "$folder"})
            [[ $(stat -L -c %s "$corpus") -lt $SMALL_CORPUS && ${folder:-$corpus.bm25}/manifest.json -nt $corpus ]] ||
                BUILD=("$PYTHON" -m "$module.build" bm25 --corpus "$corpus" ${folder:+--index "$folder"})
        else
            folder=${folder:-$corpus.flat}
            what="vectors of ${RETRIEVER_MODEL:-intfloat/e5-base-v2} over $corpus"
            COMMAND+=(--index "$folder" ${encoder[@]+"${encoder[@]}"})
            if [[ -n $file ]]; then
                [[ -f $file ]] || die "RETRIEVER_INDEX_FILE=$file: there is no such file"
                BUILD=("$PYTHON" -m "$module.build" import --faiss "$file" --corpus "$corpus" --index "$folder")
            else
                BUILD=("$PYTHON" -m "$module.build" encode --corpus "$corpus" --index "$folder")
            fi
            BUILD+=(${encoder[@]+"${encoder[@]}"})
            # A whole index: the server looks at every byte of it, and says what does not fit.
            [[ ! -f $folder/manifest.json ]] || BUILD=()
        fi
    fi
    case ${RETRIEVER_FAISS_GPU:-} in
        0) COMMAND+=(--devices cpu) ;;
        1) [[ $(count_gpus) -gt 0 ]] || die "RETRIEVER_FAISS_GPU=1, but this machine has no GPU" ;;
    esac
    COMMAND+=(--host "$host" --port "$port" --topk "$topk")
}

case $ACTION in
    start)
        pick_python
        if [[ " ${OPTIONS[*]-} " == *" --help "* ]]; then
            if [[ -n $script ]]; then exec "$PYTHON" "$script" --help; fi
            exec "$PYTHON" -m verl.utils.siop.retriever.server --help
        fi
        if [[ -n $script ]]; then own_server; else our_server; fi
        COMMAND+=(${OPTIONS[@]+"${OPTIONS[@]}"})
        if [[ -n $DRY_RUN ]]; then
            [[ ${#BUILD[@]} -eq 0 ]] || say "first: ${BUILD[*]}"
            dry_run retriever "${COMMAND[@]}"
            exit
        fi
        say "retriever: $what"
        # Without a time limit: it shows its progress, and Ctrl-C ends it.
        [[ ${#BUILD[@]} -eq 0 ]] || "${BUILD[@]}" || die "the index was not built"
        service_start "$name" "$host" "$port" "$health" "$timeout" "${COMMAND[@]}" || exit 1
        say "it answers at http://$address:$port/retrieve   stop it: $(service_call launch_retriever.sh stop)"
        ;;
    stop) service_stop "$name" "${RETRIEVER_PORT:-}" ;;
    status) service_status "$name" "${RETRIEVER_PORT:-}" ;;
    *) die "unknown action '$ACTION'; choose start, stop, status or --help" ;;
esac
