"""Running the launchers in an environment of their own, with a trainer and GPUs that only pretend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch_variables import REPLACED, TABLE

ROOT = Path(__file__).parents[2]
Environment = Mapping[str, str | Path]
# An environment in which a test sets what it is about.
OWN = {*(row.name for row in TABLE), *REPLACED, "CUDA_VISIBLE_DEVICES", "VERL_PLATFORM", "CONDA_PREFIX"}

# Python, but the trainer only writes down its arguments and two steps.
PYTHON = """\
#!/usr/bin/env bash
case "$*" in
    *verl.trainer.siop.main*)
        printf '%s\\n' "RETRIEVER_URL=${{RETRIEVER_URL:-}}" "$@" >{calls}
        echo "step:$((STEP)) - siop/turns/mean:2.00" >>"${{SIOP_LOG:-/dev/stdout}}"
        for word; do [[ $word != trainer.validation_data_dir=* ]] || mkdir -p "${{word#*=}}"; done
        ;;
    *verl.trainer.siop.report*) echo "the table" ;;
    *'m.version("torch")'*) echo "${{TORCH:-2.11.0}}" ;;
    *) exec {python} "$@" ;;
esac
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def bash(*command: str, env: Environment | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs bash with ``env`` and nothing else that the launchers would react to."""
    full = {key: value for key, value in os.environ.items() if key not in OWN}
    full |= {"VIRTUAL_ENV": sys.prefix} | {key: str(value) for key, value in (env or {}).items()}
    return subprocess.run(["bash", *command], cwd=cwd, env=full, capture_output=True, text=True, timeout=300)


def pretended_trainer(tmp_path: Path) -> Environment:
    """Environment of train_siop.sh and eval_siop.sh with a trainer that writes its arguments to ``calls``."""
    calls = tmp_path / "calls"
    write_script(tmp_path / "venv" / "bin" / "python", PYTHON.format(calls=calls, python=sys.executable))
    folders = {"OUTPUT_DIR": tmp_path / "out", "LOG_DIR": tmp_path / "logs"}
    return {"VIRTUAL_ENV": tmp_path / "venv", "N_GPUS_PER_NODE": "0", "STEP": "1", **folders}


def nvidia_smi(folder: Path, text: str) -> str:
    """PATH with an nvidia-smi of its own."""
    write_script(folder / "nvidia-smi", f"#!/usr/bin/env bash\n{text}\n")
    return f"{folder}:{os.environ['PATH']}"


FOUR_GPUS = (
    "for i in 0 1 2 3; do echo \"GPU $i: NVIDIA H100 (UUID: GPU-0$i)\"; echo '  MIG 1g.10gb Device 0: (UUID)'; done"
)
