"""Prints what a data folder (DATA_DIR) tells the trainer: Hydra overrides, each ended by NUL, for values have lines.

    python scripts/data_overrides.py DIR

The folder is one that ``python -m verl.utils.siop.data build`` has made; its ``overrides.yaml`` maps keys to values.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from launch_variables import in_quotes
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

FILES = ("manifest.json", "overrides.yaml")


def words(key: str, value: Any, new: bool = False) -> list[str]:
    """A key and its value as Hydra reads them; of a mapping one override for each of its keys, which may be new.

    Raises:
        ValueError: the value is none that an override has.
    """
    if isinstance(value, dict):
        return [word for name, item in value.items() for word in words(f"{key}.{name}", item, new=True)]
    start = "++" if new else ""
    if not isinstance(value, str | bool | int | float | None):
        raise ValueError(
            f"{key} has a {type(value).__name__}; allowed are text, numbers, true, false, null and mappings"
        )
    if not isinstance(value, str):
        return [f"{start}{key}={value if isinstance(value, float) else json.dumps(value)}"]
    return [f"{start}{key}={in_quotes(value)}"]


def overrides(folder: Path) -> list[str]:
    """The overrides of a data folder.

    Raises:
        ValueError: it is none; the message names what is missing or wrong.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ValueError(f"no {missing[0]} there; a data folder is made by python -m verl.utils.siop.data build")
    try:
        # As Hydra reads YAML: PyYAML by itself takes 1e-6 for a text.
        told = OmegaConf.to_container(OmegaConf.load(folder / FILES[1]))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{FILES[1]} cannot be read: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{FILES[1]} needs lines of the form key: value, got {type(told).__name__}")
    return [word for key, value in told.items() for word in words(str(key), value)]


if __name__ == "__main__":
    try:
        sys.stdout.write("".join(f"{word}\0" for word in overrides(Path(sys.argv[1]))))
    except ValueError as error:
        sys.exit(f"error: DATA_DIR={sys.argv[1]}: {error}")
