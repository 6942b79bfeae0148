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

ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, logging_level="error")
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
    command = f"{sys.executable} -m pip wheel --quiet --no-deps --no-build-isolation -w {out} .".split()
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


def _env(**extra: str) -> dict[str, str]:
    """The environment without PYTHONPATH, which would stand before the installed packages."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | extra


def _look(python: str | Path, folder: Path) -> list[dict]:
    done = subprocess.run([python, "-c", PROBE], cwd=folder, env=_env(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_wheel_has_every_file_and_shadows_nothing_of_upstream(wheel: Path) -> None:
    """A folder that is missing from ``packages`` in pyproject.toml is missing here."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("verl/")}
    files = [path for path in (ROOT / "verl").rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    assert names == {path.relative_to(ROOT).as_posix() for path in files}
    assert {path.suffix for path in files} == {".py", ".yaml", ".css", ".html", ".js"}
    upstream = {str(file) for file in importlib.metadata.files("verl") or ()}
    assert names & upstream == set()


def test_every_module_of_the_wheel_can_be_imported(wheel: Path, wheel_python: Path, tmp_path: Path) -> None:
    """With the packages that the tests have: what needs a GPU or vLLM imports it when it is used.

    But for the two modules that are verl's vLLM rollout on a CPU, see tests/cpu/test_vllm_rollout.py.
    """
    paths = [Path(name).with_suffix("") for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    modules = sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)
    modules = [name for name in modules if not name.endswith(("cpu.vllm_rollout", "cpu.vllm_worker"))]
    code = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    done = subprocess.run(
        [wheel_python, "-c", code, *modules], cwd=tmp_path, env=_env(), capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = done.stdout.splitlines()[-len(modules) :]
    assert all(file.startswith(str(wheel_python.parent.parent)) for file in files)


@pytest.mark.parametrize("module", ["siop_inspector", "verl.utils.siop.inspector"])
def test_the_page_over_rollouts_starts_from_any_folder(wheel_python: Path, module: str, tmp_path: Path) -> None:
    command = [str(wheel_python), "-m", module, "none"]
    done = subprocess.run(command, cwd=tmp_path, env=_env(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 1 and "error: none is no folder of a run" in done.stderr


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
    env = _env(VERL_USE_EXTERNAL_PLUGINS="none")
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
