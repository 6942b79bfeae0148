#!/usr/bin/env bash
# Starts the retriever service (BM25) in the background and waits until it answers.
#
#   RETRIEVER_CORPUS_FILE=/data/wiki-18.jsonl bash launch_retriever.sh [start] [--dry-run] [-- SERVER_OPTION ...]
#   bash launch_retriever.sh                   the toy world's corpus, if no corpus is named
#   bash launch_retriever.sh stop
#   bash launch_retriever.sh status            exit status 0 if it is healthy
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

# Sets COMMAND to the server of this project.
our_server() {
    local toy=${TOY_DIR:-runs/toy} unused
    [[ ${RETRIEVER_NAME:-bm25} == bm25 ]] ||
        die "RETRIEVER_NAME=$RETRIEVER_NAME is not allowed: the server of this project has bm25; name another server" \
            "with RETRIEVAL_SERVER_SCRIPT"
    [[ $topk -le 100 ]] || die "RETRIEVER_TOPK=$topk is not allowed: a whole number from 1 to 100"
    for unused in RETRIEVER_INDEX_FILE RETRIEVER_MODEL RETRIEVER_FAISS_GPU RETRIEVER_GPUS; do
        [[ -z ${!unused:-} ]] ||
            die "$unused=${!unused} has no effect: it is for a server of your own (RETRIEVAL_SERVER_SCRIPT); BM25 keeps" \
                "its index in RETRIEVER_INDEX_DIR and uses no GPU"
    done
    if [[ -z $corpus ]]; then
        corpus=$toy/corpus.jsonl
        [[ -f $corpus ]] || die "no corpus named and no toy world in $toy: set RETRIEVER_CORPUS_FILE, or build it with:" \
            "$PYTHON -m examples.toy_world.build --out $toy"
    fi
    [[ -f $corpus ]] || die "RETRIEVER_CORPUS_FILE=$corpus: there is no such file"
    COMMAND=("$PYTHON" -m verl.utils.siop.retriever.server --corpus "$corpus" --host "$host" --port "$port"
        --topk "$topk" ${RETRIEVER_INDEX_DIR:+--index "$RETRIEVER_INDEX_DIR"})
    what="BM25 over $corpus"
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
            dry_run retriever "${COMMAND[@]}"
            exit
        fi
        say "retriever: $what"
        service_start "$name" "$host" "$port" "$health" "$timeout" "${COMMAND[@]}" || exit 1
        say "it answers at http://$address:$port/retrieve   stop it: bash launch_retriever.sh stop"
        ;;
    stop) service_stop "$name" ;;
    status) service_status "$name" "$health" ;;
    *) die "unknown action '$ACTION'; choose start, stop, status or --help" ;;
esac
