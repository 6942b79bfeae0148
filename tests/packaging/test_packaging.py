"""The overlay: installed as a wheel and as an editable, from any folder, in the driver and in Ray workers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What the process sees, in the driver and in a Ray worker.
PROBE = """
import json, ray

def look():
    import verl
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    import verl.tools.base_tool, verl.tools.local_search_tool, verl.utils.reward_score.siop_reward
    import verl.trainer.siop, verl.utils.siop.turn_utils
    return {
        "estimator": get_adv_estimator_fn("siop").__module__,
        "upstream": verl.__file__,
        "ours": [m.__file__ for m in (verl.tools.local_search_tool, verl.utils.siop.turn_utils)],
    }

ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, logging_level="error")
print(json.dumps([look(), ray.get(ray.remote(look).remote())]))
ray.shutdown()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as `pip install .` does, so that the checkout stays as it is."""
    source = tmp_path_factory.mktemp("source") / "project"
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "logs", "*.egg-info", "build", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with this one's packages, but with the wheel in place of the editable installation."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
    python = venv / "bin" / "python"
    here = Path(sysconfig.get_path("purelib"))
    there = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    ours = {str(file).split("/")[0] for file in importlib.metadata.files("siop-verl") or ()}
    for entry in here.iterdir():
        if entry.name not in ours and entry.name != "verl":
            (there / entry.name).symlink_to(entry)
    # verl's own folders must be real: the wheel puts files into them.
    shutil.copytree(
        here / "verl", there / "verl", copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__")
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(there)
    return python


def _look(python: str | Path, folder: Path) -> list[dict]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-c", PROBE], cwd=folder, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_wheel_shadows_nothing_of_upstream(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "verl/utils/siop/turn_utils.py" in names
    assert "verl/trainer/siop/config/siop_trainer.yaml" in names
    assert "verl/trainer/siop/config/hardware/cpu.yaml" in names
    upstream = {str(file) for file in importlib.metadata.files("verl") or ()}
    assert [name for name in names if name in upstream] == []
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "verl").rglob("*.py")}
    assert source - set(names) == set()


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_wheel(wheel_python: Path, place: str, tmp_path: Path) -> None:
    for seen in _look(wheel_python, ROOT if place == "root" else tmp_path):
        assert seen["estimator"] == "verl.trainer.siop.advantage"
        assert all(str(wheel_python.parent.parent) in file for file in seen["ours"])


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_editable(place: str, tmp_path: Path) -> None:
    for seen in _look(sys.executable, ROOT if place == "root" else tmp_path):
        assert seen["estimator"] == "verl.trainer.siop.advantage"
        assert all(file.startswith(str(ROOT / "verl")) for file in seen["ours"])
        assert "site-packages" in seen["upstream"]


def test_without_the_plugin_verl_refuses_the_estimator(tmp_path: Path) -> None:
    code = "from verl.trainer.ppo.core_algos import get_adv_estimator_fn; get_adv_estimator_fn('siop')"
    env = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "siop" in done.stderr.splitlines()[-1]


def test_a_missing_registration_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo import core_algos
    from verl.trainer.siop.plugin import PluginNotLoaded, require_registered

    require_registered()
    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "siop")
    with pytest.raises(PluginNotLoaded, match=r"advantage estimator 'siop'.*verl.plugins"):
        require_registered()
