"""LoRA adapters: what the folder of one says about it, and which an engine can apply. No torch here: the HTTP front
checks adapters too."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.scorer.engines.loading import as_config_error

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_EMBEDDINGS = {"lm_head", "embed_tokens"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as peft saves it.

    Attributes:
        path: its folder.
        rank: its rank.
        modules: names of the layers that it changes.
        extras: settings beyond rank, scale and layers, which not every engine applies.
    """

    path: str
    rank: int
    modules: frozenset[str]
    extras: tuple[str, ...]


def read_adapter(path: str) -> Adapter:
    """Read ``adapter_config.json``.

    Raises:
        SiopConfigError: the folder holds no LoRA adapter.
    """
    file = Path(path) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {config['peft_type']}")
        modules = config["target_modules"]
        names = ("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "target_parameters")
        extras = [name for name in names if config.get(name)]
        extras += ["bias"] * (config.get("bias", "none") != "none")
        extras += ["target_modules as a pattern"] * isinstance(modules, str)
        return Adapter(
            path, int(config["r"]), frozenset([modules] if isinstance(modules, str) else modules), tuple(extras)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SiopConfigError(f"lora_path: {path} holds no LoRA adapter ({type(error).__name__}: {error})") from error


def read_vllm_adapter(path: str) -> Adapter:
    """The adapter, if vLLM applies all of it.

    Raises:
        SiopConfigError: the folder holds no adapter, or one that vLLM would apply in part.
    """
    adapter = read_adapter(path)
    bad = [*adapter.extras, *sorted(adapter.modules & _EMBEDDINGS)]
    if adapter.rank > VLLM_RANKS[-1]:
        bad.append(f"rank {adapter.rank} (at most {VLLM_RANKS[-1]})")
    if bad:
        raise SiopConfigError(
            f"lora_path: engine vllm cannot apply {', '.join(bad)} of {path}; merge it into the model, or use the "
            "transformers engine"
        )
    return adapter


def merge_adapter(model: Any, path: str) -> Any:
    """The transformers model with an adapter merged into its weights.

    Raises:
        SiopConfigError: the folder holds no adapter, or not one that can be merged into this model.
    """
    tied = read_adapter(path).modules & _EMBEDDINGS
    if tied and model.config.get_text_config().tie_word_embeddings:
        raise SiopConfigError(
            f"LoRA adapter {path} changes {', '.join(sorted(tied))}, whose weights the model uses in two places"
        )
    from peft import PeftModel

    with as_config_error(f"cannot load the LoRA adapter {path}"), warnings.catch_warnings():
        # peft would go on without them, as if there were no adapter.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model, path).merge_and_unload()
