"""The shell launchers: numbers, GPUs, logs, what they refuse, and that they replace nothing that is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import FOUR_GPUS, ROOT, Environment, bash, nvidia_smi, write_script

# --- GPUs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 4),
        ("2,3", 2),
        ("0, 1, 3", 3),
        ("GPU-01,GPU-03", 2),
        ("MIG-aa", 1),
        ("0,-1,1", 1),
        ("-1", 0),
        ("", 0),
        ("NoDevFiles", 0),
    ],
)
def test_gpus_are_counted_as_processes_see_them(tmp_path: Path, visible: str | None, count: int) -> None:
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    script = "set -euo pipefail; source scripts/common.sh; count_gpus"
    counted = bash("-c", script, env={**env, "PATH": nvidia_smi(tmp_path, FOUR_GPUS)})
    assert (counted.stdout, counted.stderr) == (f"{count}\n", "")
    without = bash("-c", script, env={**env, "PATH": nvidia_smi(tmp_path, "echo 'no driver'; exit 9")})
    assert (without.stdout, without.stderr) == ("0\n", "")


def test_the_trainer_gets_the_visible_gpus(tmp_path: Path, trainer: Environment) -> None:
    env = {**trainer, "N_GPUS_PER_NODE": "", "MODEL_PATH": "m", "TRAIN_FILE": "t", "VAL_FILE": "v"}
    env["PATH"] = nvidia_smi(tmp_path / "smi", FOUR_GPUS)
    assert bash("train_siop.sh", env={**env, "CUDA_VISIBLE_DEVICES": "2,3"}).returncode == 0
    assert "trainer.n_gpus_per_node=2" in (tmp_path / "calls").read_text().splitlines()
    assert bash("train_siop.sh", env={**env, "CUDA_VISIBLE_DEVICES": "-1"}).returncode == 0
    assert "hardware=cpu" in (tmp_path / "calls").read_text().splitlines()
    (tmp_path / "calls").unlink()
    refused = bash("train_siop.sh", env={**env, "CUDA_VISIBLE_DEVICES": "3,4"})
    assert refused.returncode == 1 and not (tmp_path / "calls").exists()
    assert refused.stderr == "error: CUDA_VISIBLE_DEVICES=3,4: there is no GPU 4, nvidia-smi lists 0 to 3\n"


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "name", "value", "allowed"),
    [
        ("launch_retriever.sh", "RETRIEVER_START_TIMEOUT", "abc", "from 1 to"),
        ("launch_retriever.sh", "RETRIEVER_PORT", "70000", "from 1 to 65535"),
        ("launch_retriever.sh status", "RETRIEVER_PORT", "x", "from 1 to 65535"),
        ("launch_retriever.sh", "RETRIEVER_TOPK", "0", "from 1 to"),
        ("launch_retriever.sh", "RETRIEVER_FAISS_GPU", "true", "from 0 to 1"),
        ("launch_siop_scorer.sh", "SIOP_START_TIMEOUT", "1e3", "from 1 to"),
        ("launch_siop_scorer.sh", "SIOP_NUM_GPUS", "abc", "from 0 to"),
        ("launch_siop_scorer.sh", "SIOP_TP_SIZE", "0", "from 1 to"),
        ("launch_siop_scorer.sh", "SIOP_MAX_MODEL_LEN", "-5", "from 1 to"),
        ("launch_siop_scorer.sh", "SIOP_PORT", "08390", "from 1 to 65535"),
        ("launch_siop_scorer.sh", "SIOP_GPU_MEM", "1.5", "above 0 and at most 1"),
        ("train_siop.sh", "N_GPUS_PER_NODE", "abc", "from 0 to"),
        ("train_siop.sh", "SEED", "abc", "from 0 to 2147483647"),
        ("train_siop.sh", "SEED", "99999999999999999999", "from 0 to 2147483647"),
        ("train_siop.sh", "NNODES", "0", "from 1 to"),
        ("train_siop.sh", "KL_LOSS_COEF", "a", "a number from 0"),
        ("train_siop.sh", "ROLLOUT_GPU_MEM", "0", "a share above 0"),
        ("train_siop.sh", "ROLLOUT_N", "1", "from 2 to"),
        ("train_siop.sh", "VAL_BEFORE_TRAIN", "yes", "one of true, false"),
        ("train_siop.sh", "RESUME_MODE", "resume_path", "one of auto, disable"),
        ("train_siop.sh", "TRAINER_LOGGER", "console,wandv", "a list as console,tensorboard"),
        ("train_siop.sh", "SIOP_LAMBDA", "1.5", "a number from 0 to 1"),
        ("eval_siop.sh x", "EVAL_TEMPERATURE", "hot", "a number from 0"),
        ("eval_siop.sh x", "EVAL_N", "0", "from 1 to"),
        ("eval_siop.sh x", "EVAL_N", "4", "with EVAL_TEMPERATURE=0 decoding is greedy"),
        ("launch_siop_scorer.sh", "SIOP_NLI_DEVICE", "gpu", "one of cpu, cuda"),
        ("quickstart.sh", "QUICKSTART_STEPS", "0", "from 1 to"),
        ("eval_siop.sh x", "N_GPUS_PER_NODE", "-1", "from 0 to"),
        ("eval_siop.sh x --toy-seed 3", "SEED", "1.5", "from 0 to"),
        ("eval_siop.sh x --toy-seed 3", "RETRIEVER_START_TIMEOUT", "abc", "from 1 to"),
    ],
)
def test_a_bad_number_is_refused_before_anything_is_started(
    tmp_path: Path, command: str, name: str, value: str, allowed: str
) -> None:
    logs = tmp_path / "logs"
    # Nothing that is missing here is asked for before the number.
    env: Environment = {
        "LOG_DIR": logs,
        "OUTPUT_DIR": tmp_path / "out",
        "TOY_DIR": tmp_path / "none",
        "SIOP_MODEL": "/none",
    }
    done = bash(*command.split(), env={**env, name: value})
    assert done.returncode == 1 and done.stdout == "" and not logs.exists() and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {name}={value} is not allowed: ") and allowed in line


@pytest.mark.parametrize("name", ["RETRIEVER_START_TIMEOUT", "SIOP_START_TIMEOUT", "QUICKSTART_STEPS"])
def test_quickstart_refuses_a_bad_number_before_it_builds_anything(checkout: Path, name: str) -> None:
    done = quickstart(checkout, checkout / "world", {name: "0"})
    assert done.returncode == 1 and done.stdout == "" and not (checkout / "runs").exists()
    assert re.match(rf"error: {name}=0 is not allowed: a whole number from 1 to \d+$", done.stderr)


def test_allowed_numbers_pass() -> None:
    checks = "; ".join(f"{value} check_number A 0 9" for value in ("", "A=9", "A=0", "A="))
    passed = bash("-euo", "pipefail", "-c", f"source scripts/common.sh; {checks}")
    assert (passed.returncode, passed.stderr) == (0, "")


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_toy_seed_and_other_data_exclude_each_other(tmp_path: Path, trainer: Environment) -> None:
    env = {**trainer, "TOY_DIR": tmp_path / "toy", "VAL_FILE": "my.parquet"}
    refused = bash("eval_siop.sh", str(tmp_path), "--toy-seed", "3", env=env)
    assert refused.returncode == 1 and "VAL_FILE=my.parquet" in refused.stderr and "--toy-seed 3" in refused.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["venv"]


def test_a_hub_id_is_the_model_path_and_a_mistyped_folder_is_not(tmp_path: Path, trainer: Environment) -> None:
    env = {**trainer, "VAL_FILE": "v.parquet"}
    done = bash("eval_siop.sh", "Qwen/Qwen3-4B", env=env)
    assert done.returncode == 0 and "the table" in done.stdout, done.stderr
    assert "actor_rollout_ref.model.path=Qwen/Qwen3-4B" in (tmp_path / "calls").read_text().splitlines()
    for wrong in ("tests/qwen", str(tmp_path / "none"), "qwen", "./a/b", "a/b/c"):
        refused = bash("eval_siop.sh", wrong, env=env)
        assert refused.returncode == 1
        assert f"CHECKPOINT={wrong}: no such folder, nor a model id ORG/NAME of the hub" in refused.stderr


def test_toy_seed_searches_its_own_corpus_whatever_is_exported(tmp_path: Path, trainer: Environment) -> None:
    index = tmp_path / "index"
    index.mkdir()
    (index / "meta.json").write_text("of another corpus")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    env = {
        **trainer,
        "TOY_DIR": f"{tmp_path}/toy/",
        "RETRIEVER_INDEX_DIR": index,
        "RETRIEVER_CORPUS_FILE": "/none",
        "RETRIEVER_HOST": "203.0.113.1",
        "RETRIEVAL_SERVER_SCRIPT": "/none",
        "RETRIEVER_URL": "http://203.0.113.1/retrieve",
    }
    done = bash("eval_siop.sh", str(tmp_path / "model"), "--toy-seed", "3", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "retrieval_server is stopped" in done.stdout
    assert not (tmp_path / "out" / "logs" / "retrieval_server.pid").exists()
    assert [p.name for p in index.iterdir()] == ["meta.json"]
    assert (index / "meta.json").read_text() == "of another corpus"
    world = tmp_path / "toy-seed-3"
    assert json.loads((world / "meta.json").read_text())["build"]["seed"] == 3
    called = (tmp_path / "calls").read_text().splitlines()
    assert re.fullmatch(r"RETRIEVER_URL=http://127.0.0.1:\d+/retrieve", called[0])
    assert f"data.val_files={world}/eval.parquet" in called


# --- logs -------------------------------------------------------------------------------------------------------------


def test_the_log_of_an_earlier_part_is_kept(tmp_path: Path, trainer: Environment) -> None:
    env = {**trainer, "MODEL_PATH": "m", "TRAIN_FILE": "t", "VAL_FILE": "v"}
    for step in ("1", "2"):
        assert bash("train_siop.sh", env={**env, "STEP": step}).returncode == 0
    log = tmp_path / "logs" / "siop_train.log"
    wanted = ["=== training m", "step:1", "=== training m", "step:2"]
    found = [re.sub(r" \d{4}-\S+ \S+|( into| -).*", "", line) for line in log.read_text().splitlines()]
    assert found == wanted


def test_only_the_new_part_of_a_log_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("step:1 - siop/turns/mean:9.00\nstep:4 - siop/turns/mean:9.00\n")
    script = (
        'source scripts/common.sh; start=$(log_length "$LOG"); '
        '(sleep 1; echo "step:4 - siop/turns/mean:2.50" >>"$LOG"; sleep 2) & run_watch "$LOG" "$start" $! 4'
    )
    shown = bash("-euo", "pipefail", "-c", script, env={"LOG": log})
    assert shown.stdout == "           step 4/4  turns 2.50\n"
    log.unlink()
    first = bash("-euo", "pipefail", "-c", script, env={"LOG": log})
    assert first.stdout == shown.stdout


# --- quickstart -------------------------------------------------------------------------------------------------------

_SERVICE = 'if [[ ${1:-start} == start ]]; then { echo "# $0"; env; } >>calls; fi\n'
_EVALUATE = 'mkdir -p "$OUTPUT_DIR/validation"; echo "evaluate $1 in $TOY_DIR" >>calls\n'
# Ends the quickstart, which shows the last lines of the log.
_TRAIN = """\
echo "train $*" >>calls
for step in 1 2; do echo "step:$step - siop/turns/mean:3.00" >>"$LOG_DIR/siop_train-$EXPERIMENT_NAME.log"; done
sleep 1
exit 3
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the real quickstart, whose services, training and evaluation only write down their calls."""
    (tmp_path / "scripts").mkdir()
    for name in ("quickstart.sh", "scripts/common.sh", "scripts/launch_variables.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("config", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_script(tmp_path / "scripts" / "setup_env.sh", "")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    write_script(tmp_path / ".venv" / "bin" / "python", f'exec {sys.executable} "$@"\n')
    for name in ("launch_retriever.sh", "launch_siop_scorer.sh"):
        write_script(tmp_path / name, _SERVICE)
    write_script(tmp_path / "eval_siop.sh", _EVALUATE)
    write_script(tmp_path / "train_siop.sh", _TRAIN)
    return tmp_path


def quickstart(checkout: Path, world: Path | str, env: Environment | None = None) -> subprocess.CompletedProcess[str]:
    defaults: Environment = {"PYTHONPATH": checkout, "QUICKSTART_STEPS": "2", "TOY_DIR": world}
    return bash("quickstart.sh", env={**defaults, **(env or {})}, cwd=checkout)


def finished_world(folder: Path, **build: object) -> Path:
    """A folder that says of itself that it holds a toy world."""
    described = {
        "world": "chains",
        "stale": 0.15,
        "version": 1,
        "seed": 0,
        "train_questions": 1400,
        "eval_questions": 420,
        "warm_start": {"copying_steps": 0, "imperfect_steps": 400, "worlds": 36},
        **build,
    }
    names = ["corpus.jsonl", "train.parquet", "eval.parquet", "tool_config.yaml"]
    for name in [*names, *(["model/config.json", "model/model.safetensors"] if described["warm_start"] else [])]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"my {name}")
    (folder / "meta.json").write_text(json.dumps({"build": described}))
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_quickstart_uses_the_world_that_is_there_and_services_of_its_own(checkout: Path) -> None:
    world = finished_world(checkout / "chains")
    before = contents(world)
    log = checkout / "runs" / "quickstart" / "chains-siop-seed1-2" / "logs" / "siop_train-siop.log"
    log.parent.mkdir(parents=True)
    log.write_text("step:2 - siop/turns/mean:9.00\nthe earlier part\n")
    redirections = {
        "RETRIEVER_INDEX_DIR": "/x",
        "RETRIEVER_INDEX_FILE": "/x",
        "RETRIEVAL_SERVER_SCRIPT": "/x",
        "RETRIEVER_HOST": "203.0.113.1",
        "RETRIEVER_TOPK": "9",
        "SIOP_HOST": "203.0.113.1",
        "SIOP_LORA_PATH": "/x",
        "SIOP_NLI_MODEL": "/x",
        "RAY_ADDRESS": "203.0.113.1:6379",
        "NNODES": "2",
    }
    done = quickstart(checkout, f"{world}/", redirections)
    assert "chains, seed 0, stale 0.15" in done.stdout and contents(world) == before, done.stdout + done.stderr
    calls = (checkout / "calls").read_text()
    assert calls.count("# launch_retriever.sh") == calls.count("# launch_siop_scorer.sh") == 1
    exported = dict(line.split("=", 1) for line in calls.splitlines() if re.match(r"\w+=", line))
    assert exported.pop("SIOP_NLI_MODEL") == "none" and not exported.keys() & redirections.keys()
    assert exported["RETRIEVER_CORPUS_FILE"] == f"{world}/corpus.jsonl"
    assert exported["SIOP_MODEL"] == f"{world}/model" and f"evaluate {world}/model in {world}" in calls
    # The earlier part of the log is kept and not shown.
    assert done.returncode == 1 and "training failed" in done.stderr
    assert log.read_text().startswith("step:2 - siop/turns/mean:9.00\nthe earlier part\nstep:1 - ")
    assert "9.00" not in done.stdout + done.stderr and "earlier part" not in done.stderr
    assert re.findall(r"step (\d)/2  turns (\S+)", done.stdout) == [("1", "3.00"), ("2", "3.00")]


def test_quickstart_refuses_a_world_that_it_cannot_use(checkout: Path) -> None:
    world = finished_world(checkout / "data", warm_start=None)
    before = contents(world)
    refused = quickstart(checkout, world)
    assert refused.returncode != 0 and contents(world) == before and not (checkout / "calls").exists()
    assert f"error: {world} holds a toy world (chains," in refused.stderr
    assert "no model" in refused.stderr and "--force" in refused.stderr


def test_quickstart_goes_on_from_no_other_worlds_results(checkout: Path) -> None:
    first, second = finished_world(checkout / "a"), finished_world(checkout / "b", seed=2)
    out = checkout / "out"
    quickstart(checkout, first, {"OUTPUT_DIR": out})
    calls = (checkout / "calls").read_text()
    refused = quickstart(checkout, second, {"OUTPUT_DIR": out})
    assert refused.returncode == 1 and (checkout / "calls").read_text() == calls
    assert f"OUTPUT_DIR={out} holds results of another toy world than {second}" in refused.stderr
    quickstart(checkout, first, {"OUTPUT_DIR": out})
    assert (checkout / "calls").read_text() != calls
