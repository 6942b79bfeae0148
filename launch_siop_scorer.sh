#!/usr/bin/env bash
# Starts the scoring service in the background and waits until it is healthy.
#
#   SIOP_MODEL=Qwen/Qwen3-4B bash launch_siop_scorer.sh [start] [--dry-run] [-- SERVER_OPTION ...]
#   bash launch_siop_scorer.sh stop
#   bash launch_siop_scorer.sh status          exit status 0 if it is healthy
#
# --dry-run prints the command and starts nothing. Options after -- go to the server as they are;
# bash launch_siop_scorer.sh start -- --help lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh
# shellcheck source=scripts/service.sh
source scripts/service.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}" scorer
service_arguments "${BASH_SOURCE[0]}" "$@"
variables check scorer || exit 1

name=siop_scorer
host=${SIOP_HOST:-127.0.0.1}
port=${SIOP_PORT:-8390}
url=http://$(service_address "$host"):$port
[[ -z ${SIOP_CUDA_DEVICES:-} ]] || export CUDA_VISIBLE_DEVICES=$SIOP_CUDA_DEVICES

case $ACTION in
    start)
        pick_python
        server=("$PYTHON" -m verl.utils.siop.scoring_server)
        without_plugins
        [[ " ${OPTIONS[*]-} " != *" --help "* ]] || exec "${server[@]}" --help
        [[ -n ${SIOP_MODEL:-} ]] || die "set SIOP_MODEL to the scorer model: a directory, a hub id, or none"
        seen=$(count_gpus)
        gpus=${SIOP_NUM_GPUS:-$seen}
        [[ $gpus -le $seen || -n ${RAY_ADDRESS:-} ]] ||
            die "SIOP_NUM_GPUS=$gpus is not allowed: $seen GPU(s) can be seen here"
        device=CPU
        if [[ $gpus -gt 0 ]]; then
            device="$gpus GPU(s)"
            check_torch "$gpus" SIOP_NUM_GPUS
            export SIOP_MAX_MODEL_LEN=${SIOP_MAX_MODEL_LEN:-8192} \
                SIOP_NLI_MODEL=${SIOP_NLI_MODEL:-microsoft/deberta-v2-xlarge-mnli}
            [[ $SIOP_MODEL == none ]] || check_gpu_memory "${SIOP_GPU_MEM:-0.15}" SIOP_GPU_MEM
        elif [[ -z ${SIOP_NLI_MODEL:-} ]]; then
            say "warning: no SIOP_NLI_MODEL: answers are one cluster only if their words are the same, and evidence" \
                "counts only if it repeats them (SIOP_NLI_MODEL=none says so without this warning)"
        fi
        nli=${SIOP_NLI_MODEL:-none}
        [[ $nli != none ]] || unset SIOP_NLI_MODEL
        # What the first release's variables say, in the order of the table.
        options=$(variables overrides scorer)
        mapfile -t options <<<"$options"
        command=("${server[@]}" --host "$host" --port "$port" --num-gpus "$gpus" "${options[@]}"
            ${OPTIONS[@]+"${OPTIONS[@]}"})
        if [[ -n $DRY_RUN ]]; then
            dry_run scorer "${command[@]}"
            exit
        fi
        say "scorer model $SIOP_MODEL, NLI ${nli/#none/lexical}, $device"
        service_start "$name" "$host" "$port" "$url/health" "${SIOP_START_TIMEOUT:-600}" "${command[@]}" || exit 1
        say "check it: curl -f $url/health   stop it: $(service_call launch_siop_scorer.sh stop)"
        ;;
    stop) service_stop "$name" "${SIOP_PORT:-}" ;;
    status) service_status "$name" "${SIOP_PORT:-}" ;;
    *) die "unknown action '$ACTION'; choose start, stop, status or --help" ;;
esac
