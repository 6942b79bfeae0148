#!/usr/bin/env bash
# Starts the scoring service in the background and waits until it is healthy.
#
#   SIOP_MODEL=Qwen/Qwen3-4B bash launch_siop_scorer.sh [start] [-- SERVER_OPTION ...]
#   bash launch_siop_scorer.sh stop
#   bash launch_siop_scorer.sh status          exit status 0 if it is healthy
#
# Environment:
#   SIOP_MODEL           scorer language model, a directory or a hub id (required); none: clusters and entailment only,
#                        for training with algorithm.siop_scorer=policy
#   SIOP_NLI_MODEL       NLI classifier, as cross-encoder/nli-deberta-v3-base (none: answers are compared by their words)
#   SIOP_PORT            port (8390)
#   SIOP_HOST            address to listen on (127.0.0.1, this machine only)
#   SIOP_NUM_GPUS        GPUs, one worker each (all that nvidia-smi lists; 0 means CPU)
#   SIOP_ENGINE          engine: auto, transformers (auto)
#   SIOP_GPU_MEM         share of GPU memory, for engines that reserve it; the transformers engine does not
#   SIOP_MAX_MODEL_LEN   longest prompt + response + reference in tokens (the model's limit)
#   SIOP_START_TIMEOUT   seconds to wait for it (600)
#   SIOP_API_TOKEN       bearer token that clients must bring (none)
#   LOG_DIR              place of siop_scorer.log and siop_scorer.pid (logs)
#   RAY_ADDRESS          Ray cluster to join (none: a private Ray of its own)
#   CONDA_ENV            conda environment to run in (default: active Python, or .venv)
#
# Options after -- go to the server as they are; bash launch_siop_scorer.sh start -- --help lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh
# shellcheck source=scripts/service.sh
source scripts/service.sh

name=siop_scorer
host=${SIOP_HOST:-127.0.0.1}
port=${SIOP_PORT:-8390}
url=http://$(service_address "$host"):$port

action=start
if [[ $# -gt 0 && $1 != -- ]]; then
    action=$1
    shift
fi
if [[ ${1:-} == -- ]]; then
    shift
elif [[ $# -gt 0 ]]; then
    die "unknown argument '$1'; see bash launch_siop_scorer.sh --help"
fi

case $action in
    start)
        pick_python
        if [[ " $* " == *" --help "* ]]; then
            exec "$PYTHON" -m verl.utils.siop.scoring_server --help
        fi
        [[ -n ${SIOP_MODEL:-} ]] || die "set SIOP_MODEL to the scorer model: a directory, a hub id, or none"
        engine=${SIOP_ENGINE:-auto}
        gpus=${SIOP_NUM_GPUS:-$(count_gpus)}
        [[ -z ${SIOP_GPU_MEM:-} ]] || say "SIOP_GPU_MEM=$SIOP_GPU_MEM has no effect: engine $engine reserves no memory"
        options=(--model "$SIOP_MODEL" --host "$host" --port "$port" --engine "$engine" --num-gpus "$gpus")
        [[ -z ${SIOP_NLI_MODEL:-} ]] || options+=(--nli-model "$SIOP_NLI_MODEL")
        [[ -z ${SIOP_MAX_MODEL_LEN:-} ]] || options+=(--max-model-len "$SIOP_MAX_MODEL_LEN")
        say "scorer model $SIOP_MODEL, NLI ${SIOP_NLI_MODEL:-lexical}, $([[ $gpus == 0 ]] && echo CPU || echo "$gpus GPU(s)")"
        service_start "$name" "$host" "$port" "$url/health" "${SIOP_START_TIMEOUT:-600}" \
            "$PYTHON" -m verl.utils.siop.scoring_server "${options[@]}" "$@" || exit 1
        say "check it: curl -f $url/health   stop it: bash launch_siop_scorer.sh stop"
        ;;
    stop) service_stop "$name" ;;
    status) service_status "$name" "$url/health" ;;
    -h | --help | help) print_help "${BASH_SOURCE[0]}" ;;
    *) die "unknown action '$action'; choose start, stop, status or --help" ;;
esac
