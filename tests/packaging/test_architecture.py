"""The rooms: what importing the method loads, and files that can be read in one sitting.

The arrows between the rooms are contracts in pyproject.toml, which ``scripts/lint_imports.py`` checks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES = 400

METHOD = [
    *(f"verl.utils.siop.credit.{path.stem}" for path in (ROOT / "verl" / "utils" / "siop" / "credit").glob("[!_]*.py")),
    *(f"verl.utils.siop.{name}" for name in ("errors", "nli_clustering", "siop_process_reward", "turn_utils")),
    "verl.utils.reward_score.siop_reward",
]
# Upstream's `import verl` brings torch, ray, requests, pandas: what counts is what the method adds to it.
LOADED = """
import importlib, sys
import verl, verl.utils.reward_score
before = set(sys.modules)
for name in sys.argv[1:]:
    assert name not in before, f"{name} is loaded already, so this would prove nothing"
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_the_method_loads_no_service_and_no_engine(tmp_path: Path) -> None:
    # Without our plugin, which `import verl` would load otherwise.
    env = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *METHOD], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "verl" in loaded
    assert not loaded & {"bm25s", "faiss", "fastapi", "httpx", "starlette", "transformers", "uvicorn", "vllm"}


def test_no_module_is_longer_than_can_be_read_in_one_sitting() -> None:
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in (ROOT / "verl").rglob("*.py")}
    assert {str(path): count for path, count in lines.items() if count > MAX_LINES} == {}
