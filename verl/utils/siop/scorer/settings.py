"""The service's command line, and what the workers load by it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.nli_clustering import entailment_index
from verl.utils.siop.scorer.engines.base import NO_MODEL
from verl.utils.siop.scorer.engines.lora import read_adapter
from verl.utils.siop.scorer.wire import MAX_ITEM_TOKENS, MAX_ITEMS, MAX_TEXT
from verl.utils.siop.scorer.workers import ENGINES, NLI_BACKENDS, WorkerSettings

# Options whose values must be more than 0.
ABOVE_0 = "num_workers max_concurrency threads max_model_len max_body_mb max_items max_item_tokens tensor_parallel_size"


def parser() -> argparse.ArgumentParser:
    """The service's options; :func:`worker_settings` checks them."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.siop.scoring_server",
        description="Scoring service of SIOP: support of references by a language model, clusters and entailment by an "
        "NLI model, over HTTP.",
        epilog=f"A text may have {MAX_TEXT} characters. "
        "Environment: SIOP_API_TOKEN, if set, is the bearer token that every request but /health must bring; "
        "RAY_ADDRESS, if set, is the Ray cluster to join (default: a private local Ray).",
    )

    def add(name: str, what: str, *aliases: str, **options: Any) -> None:
        parser.add_argument(name, *aliases, help=what, **options)

    def choice(name: str, choices: Sequence[str], what: str) -> None:
        add(name, what, choices=("auto", *choices), default="auto")

    def number(name: str, what: str, default: float | None = None, kind: type = int) -> None:
        add(name, what if default is None else f"{what} (default: %(default)s)", type=kind, default=default)

    add("--model", "scorer language model: a directory, a hub id, or none", required=True)
    add("--nli-model", "NLI sequence classifier: a directory or a hub id (default: none)")
    add("--nli-device", "where the NLI model is: cpu, cuda (default: as the scorer model)", choices=("cpu", "cuda"))
    auto = "auto: transformers with --nli-model, else lexical"
    choice("--nli-backend", NLI_BACKENDS, f"lexical compares words and needs no model; {auto}")
    wrong = "take an NLI model that gets an obvious entailment or contradiction wrong (for untrained test models)"
    add("--no-nli-self-test", wrong, action="store_true")
    auto = "auto: vllm on GPUs where it is installed, else transformers"
    choice("--engine", ENGINES, f"engine of the scorer model; {auto}")
    number("--tensor-parallel-size", "GPUs that share one model, vllm only", 1)
    default = "(default: 0.15 with vllm, else no limit)"
    what = f"share of each GPU's memory that the scorer model may take {default}"
    add("--gpu-memory", what, "--gpu-memory-utilization", type=float)
    add("--lora-path", "LoRA adapter on top of the scorer model: a directory (default: none)")
    number("--num-gpus", "GPUs, --tensor-parallel-size for each worker; 0: CPU (default: all seen)")
    number("--num-workers", "workers on CPU", 1)
    number("--threads", "CPU threads of each worker (default: the CPUs shared out)")
    add("--host", "address to listen on (default: %(default)s)", default="127.0.0.1")
    number("--port", "port to listen on", 8390)
    auto = "auto: float32 on CPU, the checkpoint's type on GPU"
    choice("--dtype", ("float32", "bfloat16", "float16"), f"weights of the scorer model; {auto}")
    number("--max-model-len", "longest prompt + response + reference in tokens (default: the model's limit)")
    add("--trust-remote-code", "run Python code that comes with the models", action="store_true")
    number("--max-body-mb", "largest request body; more get 413", 64, float)
    number("--max-items", "rollouts, items, groups or pairs of a request; more get 422", MAX_ITEMS)
    what = "token ids of one rollout or item with its references; more get 413"
    number("--max-item-tokens", what, MAX_ITEM_TOKENS)
    number("--max-concurrency", "requests at once; more get 503 with Retry-After", 64)
    return parser


def worker_settings(args: argparse.Namespace) -> tuple[WorkerSettings, int, int]:
    """Settings of the workers, their number and the GPUs of each.

    Raises:
        SiopConfigError: an option is wrong, names no model, or does not fit the others or the machine.
    """
    for option in ABOVE_0.split():
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise SiopConfigError(f"--{option.replace('_', '-')} must be more than 0, not {value}")
    if args.model == NO_MODEL and args.engine != "auto":
        raise SiopConfigError(f"--engine {args.engine} needs a language model, but --model is {NO_MODEL}")
    model = args.model if args.model == NO_MODEL else _model_path("--model", args.model)
    nli_backend = _nli_backend(args.nli_backend, args.nli_model)
    nli_model = _model_path("--nli-model", args.nli_model) if args.nli_model else None
    if nli_model:
        _check_nli_labels(nli_model)

    import torch

    seen = torch.cuda.device_count()
    num_gpus = args.num_gpus if args.num_gpus is not None else seen
    if num_gpus < 0 or (num_gpus > seen and not os.environ.get("RAY_ADDRESS")):
        raise SiopConfigError(f"--num-gpus is {num_gpus}, this machine has {seen}")
    if args.nli_device == "cuda" and not num_gpus:
        raise SiopConfigError("--nli-device is cuda, but no GPU is used (--num-gpus 0)")
    if args.nli_device == "cuda" and args.tensor_parallel_size > 1:
        raise SiopConfigError("--nli-device cuda: with --tensor-parallel-size above 1 the NLI model runs on the CPU")
    if args.nli_device and nli_backend == "lexical":
        raise SiopConfigError(f"--nli-device is {args.nli_device}, but the lexical NLI backend has no model")
    engine = _engine(args, num_gpus)
    num_workers = num_gpus // args.tensor_parallel_size or args.num_workers
    settings = WorkerSettings(
        model=model,
        engine=engine,
        nli_model=nli_model,
        nli_backend=nli_backend,
        nli_self_test=not args.no_nli_self_test,
        device="cuda" if num_gpus else "cpu",
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        lora_path=str(Path(args.lora_path).expanduser().resolve()) if args.lora_path else None,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory=args.gpu_memory,
        trust_remote_code=args.trust_remote_code,
        threads=args.threads or max(1, (os.cpu_count() or 1) // num_workers),
        nli_device=args.nli_device,
    )
    return settings, num_workers, args.tensor_parallel_size if num_gpus else 0


def _model_path(option: str, model: str) -> str:
    """The absolute path of a model directory (workers may run elsewhere), or a hub id as it is."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SiopConfigError(f"{option}: {model} holds no model (config.json is missing)")
        return str(path.resolve())
    if path.exists():
        raise SiopConfigError(f"{option}: {model} is not a model directory")
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise SiopConfigError(f"{option}: the model directory {model} does not exist")
    return model


def _check_nli_labels(model: str) -> None:
    """Refuse a local model that is no NLI model before anything is started for it."""
    path = Path(model) / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            entailment_index(
                {int(index): label for index, label in config.get("id2label", {0: "LABEL_0", 1: "LABEL_1"}).items()}
            )
        except (ValueError, AttributeError) as error:
            raise SiopConfigError(f"--nli-model: {model}: {error}") from error


def _nli_backend(backend: str, model: str | None) -> str:
    if backend == "transformers" and not model:
        raise SiopConfigError("--nli-backend transformers needs --nli-model")
    if backend == "lexical" and model:
        raise SiopConfigError(f"--nli-backend lexical uses no model, but --nli-model is {model}")
    return backend if backend != "auto" else "transformers" if model else "lexical"


def _engine(args: argparse.Namespace, num_gpus: int) -> str:
    """The engine that ``auto`` stands for, and whether the options of engines fit it."""
    size = args.tensor_parallel_size
    if args.model == NO_MODEL:
        for option in ("lora_path", "gpu_memory"):
            if getattr(args, option) is not None:
                raise SiopConfigError(f"--{option.replace('_', '-')} needs a language model, but --model is {NO_MODEL}")
        engine = NO_MODEL
    elif args.engine == "auto":
        engine = "vllm" if num_gpus and importlib.util.find_spec("vllm") else "transformers"
    else:
        engine = args.engine
    if engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise SiopConfigError(
            f"--engine vllm: vLLM is not installed in {sys.executable}; install the extra vllm (on CPU: "
            "bash scripts/setup_env.sh --vllm), or take --engine transformers"
        )
    if size > 1 and engine != "vllm":
        raise SiopConfigError(f"--tensor-parallel-size is {size}, but engine {engine} takes 1 only; vllm takes more")
    if size > 1 and (not num_gpus or num_gpus % size):
        raise SiopConfigError(f"--tensor-parallel-size is {size}, of which --num-gpus {num_gpus} is no multiple")
    if args.gpu_memory is not None:
        if not 0 < args.gpu_memory <= 1:
            raise SiopConfigError(f"--gpu-memory is {args.gpu_memory:g}, a share is more than 0 and at most 1")
        if not num_gpus:
            raise SiopConfigError(f"--gpu-memory is {args.gpu_memory:g}, but no GPU is used (--num-gpus 0)")
    if args.lora_path:
        read_adapter(str(Path(args.lora_path).expanduser()))
    return engine
