#!/usr/bin/env bash
# Starts the retriever in the background and waits until it answers. By default it searches a JSONL corpus with BM25;
# with RETRIEVAL_SERVER_SCRIPT it runs a Search-R1 retrieval server of your own instead.
#
#   bash launch_retriever.sh [start] [-- SERVER_OPTION ...]
#   bash launch_retriever.sh stop
#   bash launch_retriever.sh status            exit status 0 if it is healthy
#
# Environment:
#   RETRIEVER_CORPUS_FILE     JSONL file, one {"id": ..., "contents": ...} per line ($TOY_DIR/corpus.jsonl)
#   TOY_DIR                   the toy world, searched if no corpus is named (runs/toy)
#   RETRIEVER_INDEX_DIR       folder of the BM25 index (next to the corpus)
#   RETRIEVER_PORT            port (8000)
#   RETRIEVER_HOST            address to listen on (127.0.0.1, this machine only)
#   RETRIEVER_TOPK            passages per query when a request does not say, 1 to 100 (3)
#   RETRIEVER_START_TIMEOUT   seconds to wait for it (1800)
#   LOG_DIR                   place of retriever.log and retriever.pid (logs)
#   CONDA_ENV                 conda environment to run in (default: active Python, or .venv)
#
# For a server of your own:
#   RETRIEVAL_SERVER_SCRIPT   its Python script; it gets Search-R1's arguments: --index_path, --corpus_path, --topk,
#                             --retriever_name, --retriever_model, --faiss_gpu
#   RETRIEVER_INDEX_PATH      its index file (required)
#   RETRIEVER_CORPUS_FILE     its corpus (required)
#   RETRIEVER_NAME            its retriever (e5)
#   RETRIEVER_MODEL           its encoder (intfloat/e5-base-v2)
#   RETRIEVER_FAISS_GPU       1: index on the GPUs (0)
#   RETRIEVER_PORT            the port that the script listens on; it takes no argument for it
#
# Options after -- go to the server as they are; bash launch_retriever.sh start -- --help lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh
# shellcheck source=scripts/service.sh
source scripts/service.sh

name=retriever
host=${RETRIEVER_HOST:-127.0.0.1}
port=${RETRIEVER_PORT:-8000}
address=$(service_address "$host")
timeout=${RETRIEVER_START_TIMEOUT:-1800}
topk=${RETRIEVER_TOPK:-3}
health=http://$address:$port/health
[[ -z ${RETRIEVAL_SERVER_SCRIPT:-} ]] || health=tcp://$address:$port

service_arguments "${BASH_SOURCE[0]}" "$@"
case $ACTION in
    start)
        pick_python
        server=("$PYTHON" -m verl.utils.siop.retriever.server)
        [[ -z ${RETRIEVAL_SERVER_SCRIPT:-} ]] || server=("$PYTHON" "$RETRIEVAL_SERVER_SCRIPT")
        [[ " ${OPTIONS[*]-} " != *" --help "* ]] || exec "${server[@]}" --help
        check_number RETRIEVER_PORT 1 65535
        check_number RETRIEVER_START_TIMEOUT 1 "$MAX_INT"
        # Servers of others have limits of their own.
        check_number RETRIEVER_TOPK 1 "$([[ -n ${RETRIEVAL_SERVER_SCRIPT:-} ]] && echo "$MAX_INT" || echo 100)"
        check_number RETRIEVER_FAISS_GPU 0 1
        if [[ -n ${RETRIEVAL_SERVER_SCRIPT:-} ]]; then
            script=$RETRIEVAL_SERVER_SCRIPT
            [[ -f $script ]] || die "RETRIEVAL_SERVER_SCRIPT: there is no file $script"
            [[ -n ${RETRIEVER_INDEX_PATH:-} ]] || die "set RETRIEVER_INDEX_PATH to the index of $script"
            [[ -n ${RETRIEVER_CORPUS_FILE:-} ]] || die "set RETRIEVER_CORPUS_FILE to the corpus of $script"
            server+=(--index_path "$RETRIEVER_INDEX_PATH"
                --corpus_path "$RETRIEVER_CORPUS_FILE" --topk "$topk" --retriever_name "${RETRIEVER_NAME:-e5}"
                --retriever_model "${RETRIEVER_MODEL:-intfloat/e5-base-v2}")
            [[ ${RETRIEVER_FAISS_GPU:-0} != 1 ]] || server+=(--faiss_gpu)
            say "retriever: $script over $RETRIEVER_CORPUS_FILE"
        else
            corpus=${RETRIEVER_CORPUS_FILE:-${TOY_DIR:-runs/toy}/corpus.jsonl}
            if [[ ! -f $corpus ]]; then
                [[ -n ${RETRIEVER_CORPUS_FILE:-} ]] || die "no toy world in ${TOY_DIR:-runs/toy}; build it with:" \
                    "$PYTHON -m examples.toy_world.build --out ${TOY_DIR:-runs/toy}, or set RETRIEVER_CORPUS_FILE"
                die "RETRIEVER_CORPUS_FILE: there is no file $corpus"
            fi
            server+=(--corpus "$corpus" --host "$host" --port "$port" --topk "$topk")
            [[ -z ${RETRIEVER_INDEX_DIR:-} ]] || server+=(--index "$RETRIEVER_INDEX_DIR")
            say "retriever: BM25 over $corpus"
        fi
        service_start "$name" "$host" "$port" "$health" "$timeout" "${server[@]}" ${OPTIONS[@]+"${OPTIONS[@]}"} ||
            exit 1
        say "it answers at http://$address:$port/retrieve   stop it: bash launch_retriever.sh stop"
        ;;
    stop) service_stop "$name" ;;
    status)
        check_number RETRIEVER_PORT 1 65535
        service_status "$name" "$health"
        ;;
    -h | --help | help) print_help "${BASH_SOURCE[0]}" ;;
    *) die "unknown action '$ACTION'; choose start, stop, status or --help" ;;
esac
