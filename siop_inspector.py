"""The page over rollouts: ``python -m siop_inspector RUN``, see :mod:`verl.utils.siop.inspector`.

Outside of the package ``verl``, whose import brings torch, Ray and transformers: five seconds and 500 MB that a page
does not need. ``verl`` and ``verl.utils`` become packages of the same folders as always, but of which no ``__init__``
is executed.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path


def _without_init() -> None:
    here = Path(__file__).resolve().parent / "verl"  # of the checkout, or of the installed package
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
