"""Runs import-linter over this repository's part of ``verl``; the contracts are in ``pyproject.toml``.

import-linter looks packages up by import, and upstream's installed ``verl`` would hide the overlay. So here ``verl`` is
the folder of this repository, as the namespace package that it is; nothing of it is imported, only read.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

from importlinter.cli import lint_imports

overlay = ModuleSpec("verl", None, is_package=True)
overlay.submodule_search_locations = [str(Path(__file__).resolve().parents[1] / "verl")]
sys.modules["verl"] = module_from_spec(overlay)
sys.exit(lint_imports(no_cache=True, no_logo=True))
