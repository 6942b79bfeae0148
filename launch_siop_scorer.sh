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
#   SIOP_NLI_MODEL       NLI classifier, as cross-encoder/nli-deberta-v3-base (none: answers are compared by words)
#   SIOP_PORT            port (8390)
#   SIOP_HOST            address to listen on (127.0.0.1, this machine only)
#   SIOP_NUM_GPUS        GPUs (those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists; 0 means CPU)
#   SIOP_ENGINE          engine: auto, transformers, vllm (auto: vllm on GPUs where it is installed)
#   SIOP_TP_SIZE         GPUs that share one model, with vllm (1: one worker for each GPU)
#   SIOP_GPU_MEM         share of each GPU's memory that the scorer model may take (0.85 with vllm, else no limit)
#   SIOP_DTYPE           weights: auto, float32, bfloat16, float16 (auto: float32 on CPU, the checkpoint's type on GPU)
#   SIOP_LORA_PATH       LoRA adapter on top of the scorer model (none)
#   SIOP_MAX_MODEL_LEN   longest prompt + response + reference in tokens (the model's limit)
#   SIOP_START_TIMEOUT   seconds to wait for it (600)
#   SIOP_API_TOKEN       bearer token that clients must bring (none)
#   LOG_DIR              place of siop_scorer.log and siop_scorer.pid (logs)
#   VLLM_CPU_KVCACHE_SPACE   GiB of cache, with vllm on a CPU (2)
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

service_arguments "${BASH_SOURCE[0]}" "$@"
case $ACTION in
    start)
        pick_python
        server=("$PYTHON" -m verl.utils.siop.scoring_server)
        [[ " ${OPTIONS[*]-} " != *" --help "* ]] || exec "${server[@]}" --help
        check_number SIOP_PORT 1 65535
        check_number SIOP_START_TIMEOUT 1 "$MAX_INT"
        check_number SIOP_NUM_GPUS 0 65536
        check_number SIOP_TP_SIZE 1 1024
        check_number SIOP_MAX_MODEL_LEN 1 "$MAX_INT"
        [[ ${SIOP_GPU_MEM:-1} =~ ^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)$ ]] ||
            die "SIOP_GPU_MEM=$SIOP_GPU_MEM is not allowed: a share above 0 and at most 1, as 0.85"
        [[ -n ${SIOP_MODEL:-} ]] || die "set SIOP_MODEL to the scorer model: a directory, a hub id, or none"
        gpus=${SIOP_NUM_GPUS:-$(count_gpus)}
        options=(--model "$SIOP_MODEL" --host "$host" --port "$port" --engine "${SIOP_ENGINE:-auto}" --num-gpus "$gpus")
        [[ -z ${SIOP_NLI_MODEL:-} ]] || options+=(--nli-model "$SIOP_NLI_MODEL")
        [[ -z ${SIOP_TP_SIZE:-} ]] || options+=(--tensor-parallel-size "$SIOP_TP_SIZE")
        [[ -z ${SIOP_GPU_MEM:-} ]] || options+=(--gpu-memory "$SIOP_GPU_MEM")
        [[ -z ${SIOP_DTYPE:-} ]] || options+=(--dtype "$SIOP_DTYPE")
        [[ -z ${SIOP_LORA_PATH:-} ]] || options+=(--lora-path "$SIOP_LORA_PATH")
        [[ -z ${SIOP_MAX_MODEL_LEN:-} ]] || options+=(--max-model-len "$SIOP_MAX_MODEL_LEN")
        device=CPU
        [[ $gpus == 0 ]] || device="$gpus GPU(s)"
        say "scorer model $SIOP_MODEL, NLI ${SIOP_NLI_MODEL:-lexical}, $device"
        service_start "$name" "$host" "$port" "$url/health" "${SIOP_START_TIMEOUT:-600}" \
            "${server[@]}" "${options[@]}" ${OPTIONS[@]+"${OPTIONS[@]}"} || exit 1
        say "check it: curl -f $url/health   stop it: bash launch_siop_scorer.sh stop"
        ;;
    stop) service_stop "$name" ;;
    status)
        check_number SIOP_PORT 1 65535
        service_status "$name" "$url/health"
        ;;
    -h | --help | help) print_help "${BASH_SOURCE[0]}" ;;
    *) die "unknown action '$ACTION'; choose start, stop, status or --help" ;;
esac
