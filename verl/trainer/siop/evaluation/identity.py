"""What the numbers of an evaluation depend on: model, data, prompts, decoding, tools, retrieval, versions."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from verl.trainer.siop.checks.data import files_of
from verl.trainer.siop.evaluation.questions import EvaluationError, digest_of
from verl.utils.siop.files import sha256_of
from verl.utils.siop.tokenizer_digest import tokenizer_digest

DATA_MANIFEST = "manifest.json"
_THREADS = 4  # hashing leaves the interpreter to others
_MANY_FILES = 4
# Kinds of weight files, of which the first that is there is loaded; and what else has such a name.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".distcp")
_OTHER = ("optim", "extra_state", "training_args", "scheduler", "rng")
_TOOL_SETTINGS = ("topk", "max_chars", "country", "language")
_PACKAGES = ("siop-verl", "verl", "torch", "transformers")


def data_of(config: DictConfig) -> dict[str, Any]:
    """The data files: their digests, and that of a ``manifest.json`` beside each; null for what is no file.

    (A dataset class of the user's, ``data.custom_cls``, may read something else.)
    """
    paths = [Path(path).expanduser() for path in files_of(config, "data.val_files")]
    manifests = [path.with_name(DATA_MANIFEST) for path in paths]
    return {
        "files": [str(path) for path in paths],
        "sha256": [sha256_of(path) if path.is_file() else None for path in paths],
        "manifest_sha256": [sha256_of(path) if path.is_file() else None for path in manifests],
    }


def model_of(config: DictConfig) -> dict[str, Any]:
    """The checkpoint: path, step (null if the path tells none), digest over the names and digests of its weights.

    Raises:
        EvaluationError: its weights cannot be found.
    """
    trainer, model = config.trainer, config.actor_rollout_ref.model
    if trainer.resume_mode == "resume_path":
        named = str(trainer.resume_from_path)
        files = _weights(Path(named) / "actor", without="huggingface")
    else:
        named = str(model.path)
        files = _weights(_local_folder(named))
    adapter = model.get("lora_adapter_path")
    if adapter:
        files += _weights(_local_folder(str(adapter)))
    step = re.search(r"global_step_(\d+)(?:/|$)", named)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(sha256_of, files)
        digests = list(tqdm(found, "hash weights", len(files), disable=len(files) < _MANY_FILES))
    return {
        "checkpoint": named,
        "adapter": str(adapter) if adapter else None,
        "step": int(step[1]) if step else None,
        "weights": digest_of([[path.name, digest] for path, digest in zip(files, digests, strict=True)]),
        "weight_files": len(files),
    }


def _local_folder(named: str) -> Path:
    from huggingface_hub import snapshot_download
    from verl.utils.fs import copy_to_local

    folder = Path(copy_to_local(named)).expanduser()
    if folder.is_dir():
        return folder
    try:  # the model has been loaded, so it is in the cache
        return Path(snapshot_download(named, local_files_only=True))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{named}: neither a folder nor a model in the hub's cache: {error}") from error


def _weights(folder: Path, without: str | None = None) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(_OTHER))
    for suffix in _WEIGHTS:
        found = [path for path in files if path.suffix == suffix and without not in path.relative_to(folder).parts]
        if found:
            return found
    raise EvaluationError(f"{folder} has no weights ({', '.join(f'*{suffix}' for suffix in _WEIGHTS)})")


def tokenizer_of(config: DictConfig, tokenizer: Any) -> dict[str, Any]:
    """Digests of what token ids mean and of the chat template, and what is passed to the template."""
    template = config.actor_rollout_ref.model.get("custom_chat_template") or tokenizer.chat_template
    return {
        "sha256": tokenizer_digest(tokenizer),
        "chat_template_sha256": digest_of(template),
        "chat_template_kwargs": _plain(config.data.get("apply_chat_template_kwargs")) or {},
    }


def decoding_of(config: DictConfig) -> dict[str, Any]:
    """How answers are sampled, and the limits: tokens of the prompt, of a turn, of all turns and results; turns.

    verl has no limit for one turn but that of all of them.
    """
    rollout = config.actor_rollout_ref.rollout
    sampling, multi_turn = rollout.val_kwargs, rollout.multi_turn
    return {
        **{name: sampling[name] for name in ("n", "temperature", "top_p", "top_k")},
        "seed": rollout.get("seed"),
        "max_prompt_tokens": rollout.prompt_length,
        "max_turn_tokens": rollout.response_length,
        "max_response_tokens": rollout.response_length,
        "max_model_len": rollout.get("max_model_len"),
        "dtype": rollout.get("dtype"),
        "agent": rollout.agent.default_agent_loop,
        **{
            name: multi_turn.get(name)
            for name in (
                "format",
                "max_assistant_turns",
                "max_user_turns",
                "max_parallel_calls",
                "max_tool_response_length",
                "tool_response_truncate_side",
            )
        },
    }


def probe_of(config: DictConfig) -> dict[str, Any]:
    """The texts around a reference when its probability is measured."""
    algorithm = config.algorithm
    return {"prefix": algorithm.get("siop_reference_prefix"), "suffix": algorithm.get("siop_reference_suffix")}


def tools_of(tools: Mapping[str, Any]) -> dict[str, Any]:
    """Of each tool its class, the digest of its schema, and how much it shows."""
    return {
        name: {
            "class": type(tool).__name__,
            "schema_sha256": digest_of(tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True)),
            **{
                key: getattr(tool.settings, key)
                for key in _TOOL_SETTINGS
                if hasattr(getattr(tool, "settings", None), key)
            },
        }
        for name, tool in tools.items()
    }


def versions_of(config: DictConfig) -> dict[str, str | None]:
    """Of the packages that compute; ``engine`` is ``rollout.name``."""
    engine = str(config.actor_rollout_ref.rollout.name)
    versions: dict[str, str | None] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    try:
        versions[engine] = importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:  # an engine of this project, or of the user's
        versions[engine] = None
    return versions


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
