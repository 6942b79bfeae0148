"""What the folder of a LoRA adapter says about it. No torch here: the HTTP front checks adapters too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from verl.utils.siop.errors import SiopConfigError


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
