"""Runs the inspector without importing what verl's ``__init__`` imports: torch, Ray and transformers.

A script, to be run by its path. ``verl`` and ``verl.utils`` become packages of the same folders as always, but of which
no ``__init__`` is executed.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path


def _without_init() -> None:
    here = Path(__file__).resolve().parents[3]  # verl, of the checkout or of the installed package
    # The folder of this script, of which Python takes every file for a module.
    sys.path = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    spec = importlib.util.find_spec("verl")
    upstream: list[str] = list(spec.submodule_search_locations or ()) if spec else []
    for name, inner in (("verl", ""), ("verl.utils", "utils")):
        package = types.ModuleType(name)
        package.__path__ = list(dict.fromkeys(str(Path(place, inner)) for place in [str(here), *upstream]))
        sys.modules[name] = package


if __name__ == "__main__":
    _without_init()
    from verl.utils.siop.inspector.cli import main

    sys.exit(main())
