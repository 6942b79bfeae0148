"""The table of the launchers' variables: every name of the first release does what it says or is refused by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import launch_variables as variables
import pytest
from hydra import compose, initialize_config_dir
from launching import FOUR_GPUS, ROOT, Environment, bash, nvidia_smi, write_script

NAMED = {"MODEL_PATH": "m", "TRAIN_FILE": "t.parquet", "VAL_FILE": "v.parquet"}
ROLLOUT, REF = "actor_rollout_ref.rollout", "actor_rollout_ref.ref"

# The first release's variables with a value of their own, and what the trainer must be told.
TRAINING = [
    ("MODEL_PATH", "Qwen/Qwen3-4B", ["actor_rollout_ref.model.path=Qwen/Qwen3-4B"]),
    ("TRAIN_FILE", "/data/my train.parquet", ["data.train_files='/data/my train.parquet'"]),
    ("VAL_FILE", "[a.parquet,b.parquet]", ["data.val_files=[a.parquet,b.parquet]"]),
    ("OUTPUT_DIR", "{tmp}/o", ["trainer.default_local_dir={tmp}/o"]),
    ("TRAIN_BATCH_SIZE", "64", ["data.train_batch_size=64"]),
    ("VAL_BATCH_SIZE", "128", ["data.val_batch_size=128"]),
    ("MAX_PROMPT_LENGTH", "512", ["data.max_prompt_length=512"]),
    ("MAX_RESPONSE_LENGTH", "2048", ["data.max_response_length=2048"]),
    ("PPO_MINI_BATCH_SIZE", "16", ["actor_rollout_ref.actor.ppo_mini_batch_size=16"]),
    (
        "PPO_MICRO_BATCH_SIZE_PER_GPU",
        "4",
        ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", "actor_rollout_ref.actor.use_dynamic_bsz=false"],
    ),
    (
        "LOGPROB_MICRO_BATCH_SIZE_PER_GPU",
        "8",
        [f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=8", f"{ROLLOUT}.log_prob_use_dynamic_bsz=false"],
    ),
    (
        "REF_LOGPROB_MICRO_BATCH_SIZE_PER_GPU",
        "8",
        [f"{REF}.log_prob_micro_batch_size_per_gpu=8", f"{REF}.log_prob_use_dynamic_bsz=false"],
    ),
    ("KL_LOSS_COEF", "0.01", ["actor_rollout_ref.actor.kl_loss_coef=0.01", "actor_rollout_ref.actor.use_kl_loss=true"]),
    ("KL_LOSS_COEF", "0", ["actor_rollout_ref.actor.kl_loss_coef=0", "actor_rollout_ref.actor.use_kl_loss=false"]),
    ("ROLLOUT_N", "8", [f"{ROLLOUT}.n=8"]),
    ("ROLLOUT_TP_SIZE", "4", [f"{ROLLOUT}.tensor_model_parallel_size=4"]),
    ("ROLLOUT_GPU_MEM", "0.4", [f"{ROLLOUT}.gpu_memory_utilization=0.4"]),
    ("ROLLOUT_TEMPERATURE", "0.8", [f"{ROLLOUT}.temperature=0.8"]),
    ("MAX_ASSISTANT_TURNS", "3", [f"{ROLLOUT}.multi_turn.max_assistant_turns=3"]),
    ("MAX_TOOL_RESPONSE_LENGTH", "1024", [f"{ROLLOUT}.multi_turn.max_tool_response_length=1024"]),
    ("SIOP_LAMBDA", "0.3", ["algorithm.siop_lambda=0.3"]),
    ("SIOP_ETA", "2", ["algorithm.siop_eta=2"]),
    ("SIOP_NUM_REFS", "1", ["algorithm.siop_num_refs=1"]),
    ("TRAINER_LOGGER", "console,wandb", ["trainer.logger=[console,wandb]"]),
    ("TRAINER_LOGGER", "[console, wandb]", ["trainer.logger=[console,wandb]"]),
    ("TRAINER_LOGGER", """['console', "wandb"]""", ["trainer.logger=[console,wandb]"]),
    ("PROJECT_NAME", "p", ["trainer.project_name=p"]),
    ("EXPERIMENT_NAME", "e", ["trainer.experiment_name=e"]),
    ("VAL_BEFORE_TRAIN", "true", ["trainer.val_before_train=true"]),
    ("TOTAL_EPOCHS", "2", ["trainer.total_epochs=2"]),
    ("NNODES", "2", ["trainer.nnodes=2"]),
    ("SAVE_FREQ", "5", ["trainer.save_freq=5"]),
    ("TEST_FREQ", "-1", ["trainer.test_freq=-1"]),
    ("RESUME_MODE", "disable", ["trainer.resume_mode=disable"]),
]


ON_GPUS = {"ROLLOUT_TP_SIZE": "4", "ROLLOUT_GPU_MEM": "0.4"}


@pytest.mark.parametrize("name", ON_GPUS)
@pytest.mark.parametrize("script", ["train_siop.sh", "eval_siop.sh"])
@pytest.mark.parametrize("gpus", ["0", ""])
def test_what_has_no_effect_on_a_cpu_is_refused(
    tmp_path: Path, trainer: Environment, name: str, script: str, gpus: str
) -> None:
    path = nvidia_smi(tmp_path / "smi", "exit 9")
    env = {**trainer, **NAMED, "N_GPUS_PER_NODE": gpus, "PATH": path, name: ON_GPUS[name]}
    refused = bash(script, env=env)
    assert refused.returncode == 1 and not (tmp_path / "calls").exists()
    assert refused.stderr.startswith(f"error: {name}={ON_GPUS[name]} has no effect on a CPU")


@pytest.mark.parametrize("row", variables.TABLE, ids=lambda row: row.name)
def test_an_empty_variable_is_an_unset_one(row: variables.Variable) -> None:
    script = f"source scripts/common.sh; echo ${{{row.name}-unset}}"
    shown = bash("-c", script, env={row.name: ""}).stdout.strip()
    assert shown == ("" if row.name == "SERPER_CACHE_DIR" else "unset")


def called(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize(("name", "value", "told"), TRAINING)
def test_a_variable_of_the_release_reaches_the_trainer(
    tmp_path: Path, trainer: Environment, name: str, value: str, told: list[str]
) -> None:
    value, told = value.replace("{tmp}", str(tmp_path)), [word.replace("{tmp}", str(tmp_path)) for word in told]
    gpus = "1" if name in ON_GPUS else "0"
    done = bash("train_siop.sh", env={**trainer, **NAMED, "N_GPUS_PER_NODE": gpus, name: value})
    assert done.returncode == 0, done.stderr
    assert set(told) <= set(called(tmp_path))


@pytest.mark.parametrize("name", sorted(variables.REPLACED))
def test_a_name_that_means_nothing_is_refused_with_the_one_to_use(tmp_path: Path, name: str) -> None:
    script = "launch_retriever.sh" if name.startswith("RETRIEVER") else "train_siop.sh"
    done = bash(script, env={**NAMED, name: "x", "LOG_DIR": tmp_path / "logs"})
    assert done.returncode == 1 and not (tmp_path / "logs").exists()
    assert done.stderr == f"error: {name}=x is not used here; {variables.REPLACED[name]}\n"


def test_overrides_come_with_and_without_dashes_and_our_keys_with_a_plus(tmp_path: Path, trainer: Environment) -> None:
    words = ["ablation=release", "+algorithm.siop_lambda=0.3", "++algorithm.siop_eta=1", "+data.new=1", "~trainer.x"]
    for arguments in (words, ["--", *words]):
        assert bash("train_siop.sh", *arguments, env={**trainer, **NAMED}).returncode == 0
        plain = ["ablation=release", "algorithm.siop_lambda=0.3", "algorithm.siop_eta=1", "+data.new=1", "~trainer.x"]
        assert called(tmp_path)[-5:] == plain
    refused = bash("train_siop.sh", "release", env={**trainer, **NAMED})
    assert refused.returncode == 1 and "unknown argument 'release'" in refused.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MODEL_PAHT", "MODEL_PATH"),
        ("SIOP_LAMDA", "SIOP_LAMBDA"),
        ("TRAINFILE", "TRAIN_FILE"),
        ("TRAIN_BATCHSIZE", "TRAIN_BATCH_SIZE"),
        ("RETRIVER_URL", "RETRIEVER_URL"),
        ("KL_LOSS_COEFF", "KL_LOSS_COEF"),
        ("NNODE", "NNODES"),
        ("NGPUS", "N_GPUS"),
    ],
)
def test_a_name_that_is_almost_one_of_ours_is_refused(tmp_path: Path, name: str, meant: str) -> None:
    done = bash("train_siop.sh", "--dry-run", env={"LOG_DIR": tmp_path / "logs", name: "x"})
    assert done.returncode == 1 and not (tmp_path / "logs").exists()
    assert done.stderr.startswith(f"error: {name} is set, but nothing here reads it; did you mean {meant}?")


def test_names_of_others_are_left_alone() -> None:
    others = (
        "PYTHONPATH PATH HOME SLURM_NNODES RAY_ADDRESS HF_HOME MODEL TRAIN SEED_OFFSET RETRIEVER_SERVICE_HOST CUDA_HOME"
    )
    assert variables.misspelt(dict.fromkeys(others.split(), "x")) == {}
    # Nor do the project's own names look like each other.
    names = {row.name for row in variables.TABLE}
    internal = ("SIOP_API_TOKEN", "SIOP_CONSOLE", "SIOP_LOG", "SIOP_SERVICE", "TENSORBOARD_DIR", "VERL_PLATFORM")
    assert variables.misspelt({**dict.fromkeys(names, "x"), **dict.fromkeys(internal, "x")}) == {}


# --- the toy world only when nothing else is named -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "missing"),
    [
        ("MODEL_PATH", "TRAIN_FILE"),
        ("TRAIN_FILE", "MODEL_PATH"),
        ("VAL_FILE", "MODEL_PATH"),
        ("MODEL_PATH TRAIN_FILE", "VAL_FILE"),
    ],
)
def test_what_is_missing_beside_what_is_named_is_asked_for(
    tmp_path: Path, trainer: Environment, named: str, missing: str
) -> None:
    world = tmp_path / "toy"
    world.mkdir()
    (world / "eval.parquet").touch()
    env = {**trainer, "TOY_DIR": world, **dict.fromkeys(named.split(), "x")}
    done = bash("train_siop.sh", env=env)
    assert done.returncode == 1 and f"error: set {missing} to" in done.stderr and not (tmp_path / "calls").exists()
    toy = bash("train_siop.sh", env={**trainer, "TOY_DIR": world})
    assert toy.returncode == 0 and f"the toy world in {world}" in toy.stdout
    assert f"data.val_files={world}/eval.parquet" in called(tmp_path)


def test_an_evaluation_as_the_release_names_it(tmp_path: Path, trainer: Environment) -> None:
    checkpoint = tmp_path / "global_step_7"
    (checkpoint / "actor").mkdir(parents=True)
    env = {**trainer, "MODEL_PATH": "Qwen/Qwen3-4B", "CHECKPOINT_PATH": checkpoint, "VAL_FILE": "v.parquet"}
    done = bash("eval_siop.sh", env={**env, "SIOP_LAMBDA": "0.5", "ROLLOUT_TEMPERATURE": "0.7"})
    assert done.returncode == 0, done.stderr
    told = called(tmp_path)
    assert {f"trainer.resume_from_path={checkpoint}", "actor_rollout_ref.model.path=Qwen/Qwen3-4B"} <= set(told)
    assert "trainer.val_only=true" in told and not any("val_kwargs" in word for word in told)
    assert "note: SIOP_LAMBDA has no effect on an evaluation" in done.stdout
    assert "note: ROLLOUT_TEMPERATURE has no effect on an evaluation; use EVAL_TEMPERATURE" in done.stdout
    assert bash("eval_siop.sh", env={**env, "EVAL_TEMPERATURE": "0.7"}).returncode == 0
    assert {f"{ROLLOUT}.val_kwargs.temperature=0.7", f"{ROLLOUT}.val_kwargs.do_sample=true"} <= set(called(tmp_path))
    assert bash("eval_siop.sh", env={**env, "EVAL_TEMPERATURE": "0.7", "EVAL_N": "4"}).returncode == 0
    assert f"{ROLLOUT}.val_kwargs.n=4" in called(tmp_path)
    refused = bash("eval_siop.sh", env={**env, "EVAL_TEMPERATURE": "0.0", "EVAL_N": "4"})
    assert refused.returncode == 1 and "error: EVAL_N=4 is not allowed: with EVAL_TEMPERATURE=0.0" in refused.stderr
    asked = bash("eval_siop.sh", env={**env, "VAL_FILE": "", "CHECKPOINT_PATH": checkpoint})
    assert asked.returncode == 1 and "error: set VAL_FILE" in asked.stderr


# --- Python and GPUs -------------------------------------------------------------------------------------------------


def fake_python(folder: Path) -> Path:
    return write_script(folder / "bin" / "python", f'exec {sys.executable} "$@"\n').parent.parent


def test_what_is_activated_wins_over_the_projects_environment(tmp_path: Path) -> None:
    conda, venv = fake_python(tmp_path / "conda"), fake_python(tmp_path / "venv")
    script = "set -euo pipefail; source scripts/common.sh; pick_python"
    nothing = {"VIRTUAL_ENV": ""}
    for env, wanted in (
        ({"VIRTUAL_ENV": venv, "CONDA_PREFIX": conda}, venv),
        ({**nothing, "CONDA_PREFIX": conda, "CONDA_DEFAULT_ENV": "siop"}, conda),
        ({**nothing, "CONDA_PREFIX": conda, "CONDA_DEFAULT_ENV": "base"}, conda),
    ):
        assert bash("-c", script, env=env).stdout.endswith(f"Python: {wanted}/bin/python\n")
    # Conda's base without the project was activated by conda itself.
    write_script(conda / "bin" / "python", "#!/usr/bin/env bash\nexit 1\n")
    base = bash("-c", script, env={**nothing, "CONDA_PREFIX": conda, "CONDA_DEFAULT_ENV": "base"})
    assert str(conda) not in base.stdout
    refused = bash("-c", script, env={**nothing, "CONDA_PREFIX": conda, "CONDA_DEFAULT_ENV": "siop"})
    assert refused.returncode == 1 and f"this project is not installed in {conda}/bin/python" in refused.stderr


MEMORY = """\
case "$*" in
    -L) for i in 0 1; do echo "GPU $i: NVIDIA H100 (UUID: GPU-0$i)"; done ;;
    *memory.free*) echo "0, 80000, 81559"; [[ "$*" == *"-i 0 "* ]] || echo "1, 30000, 81559" ;;
esac
"""


def test_gpu_memory_that_is_not_free_is_refused(tmp_path: Path, trainer: Environment) -> None:
    env = {**trainer, **NAMED, "N_GPUS_PER_NODE": "", "PATH": nvidia_smi(tmp_path / "smi", MEMORY)}
    refused = bash("train_siop.sh", env=env)
    assert refused.returncode == 1 and not (tmp_path / "calls").exists()
    assert "ROLLOUT_GPU_MEM=0.5 asks for 40779 MiB of GPU 1, of which 30000 MiB are free" in refused.stderr
    assert bash("train_siop.sh", env={**env, "ROLLOUT_GPU_MEM": "0.3"}).returncode == 0
    assert bash("train_siop.sh", env={**env, "CUDA_VISIBLE_DEVICES": "0"}).returncode == 0
    scorer = bash("launch_siop_scorer.sh", env={**env, "SIOP_MODEL": "m", "SIOP_GPU_MEM": "0.9"})
    assert scorer.returncode == 1 and "SIOP_GPU_MEM=0.9 asks for" in scorer.stderr


def test_a_cpu_build_of_torch_on_gpus_is_refused(tmp_path: Path, trainer: Environment) -> None:
    gpus = nvidia_smi(tmp_path / "smi", FOUR_GPUS)
    env = {**trainer, **NAMED, "N_GPUS_PER_NODE": "", "PATH": gpus, "TORCH": "2.13.0+cpu"}
    refused = bash("train_siop.sh", env=env)
    assert refused.returncode == 1 and "torch 2.13.0+cpu" in refused.stderr and "N_GPUS_PER_NODE=0" in refused.stderr
    assert bash("train_siop.sh", env={**env, "N_GPUS_PER_NODE": "0"}).returncode == 0


def test_attention_without_flash_attn_is_sdpa_and_says_so(tmp_path: Path, trainer: Environment) -> None:
    env = {**trainer, **NAMED, "N_GPUS_PER_NODE": "", "PATH": nvidia_smi(tmp_path / "smi", FOUR_GPUS)}
    done = bash("train_siop.sh", env=env)
    assert done.returncode == 0 and "pip install flash-attn" in done.stdout
    assert "++actor_rollout_ref.model.override_config.attn_implementation=sdpa" in called(tmp_path)


# --- services --------------------------------------------------------------------------------------------------------


def test_the_scorer_as_the_release_starts_it(tmp_path: Path, trainer: Environment) -> None:
    env = {**trainer, "SIOP_MODEL": "Qwen/Qwen3-4B", "PATH": nvidia_smi(tmp_path / "smi", FOUR_GPUS)}
    done = bash("launch_siop_scorer.sh", "--dry-run", env={**env, "SIOP_CUDA_DEVICES": "2,3", "SIOP_NLI_DEVICE": "cpu"})
    assert done.returncode == 0, done.stderr
    (command,) = (line for line in done.stdout.splitlines() if "scoring_server" in line)
    for option in (
        "--model Qwen/Qwen3-4B",
        "--num-gpus 2",
        "--nli-model microsoft/deberta-v2-xlarge-mnli",
        "--nli-device cpu",
        "--max-model-len 8192",
    ):
        assert f" {option} " in f"{command} "
    assert not (tmp_path / "logs").exists()
    many = bash("launch_siop_scorer.sh", env={**env, "SIOP_NUM_GPUS": "8"})
    assert many.returncode == 1 and "SIOP_NUM_GPUS=8 is not allowed: 4 GPU(s) can be seen here" in many.stderr
    cpu = bash("launch_siop_scorer.sh", "--dry-run", env={**env, "SIOP_NUM_GPUS": "0"})
    assert "warning: no SIOP_NLI_MODEL" in cpu.stdout


def test_a_retriever_as_the_release_starts_it(tmp_path: Path, trainer: Environment) -> None:
    data = tmp_path / "data"
    data.mkdir()
    script = write_script(tmp_path / "server.py", "")
    env = {**trainer, "RETRIEVAL_SERVER_SCRIPT": script, "RETRIEVER_CORPUS_DIR": data}
    asked = bash("launch_retriever.sh", "--dry-run", env=env)
    assert asked.returncode == 1 and f"RETRIEVER_INDEX_FILE={data}/e5_Flat.index: there is no such file" in asked.stderr
    for name in ("e5_Flat.index", "wiki-18.jsonl"):
        (data / name).touch()
    done = bash("launch_retriever.sh", "start", "--dry-run", env=env)
    assert done.returncode == 0, done.stderr
    expected = f"{script} --index_path {data}/e5_Flat.index --corpus_path {data}/wiki-18.jsonl --topk 3 "
    assert f"{expected}--retriever_name e5 --retriever_model intfloat/e5-base-v2 \n" in done.stdout
    gpus = bash("launch_retriever.sh", "--dry-run", env={**env, "PATH": nvidia_smi(tmp_path / "smi", FOUR_GPUS)})
    assert "--faiss_gpu" in gpus.stdout
    conda = bash("launch_retriever.sh", env={**env, "RETRIEVER_CONDA_ENV": "doesnotexist", "PATH": os.environ["PATH"]})
    assert conda.returncode == 1 and "CONDA_ENV=doesnotexist" in conda.stderr


def test_the_retriever_that_the_variables_name(tmp_path: Path, trainer: Environment) -> None:
    data = tmp_path / "data"
    data.mkdir()
    corpus = data / "wiki-18.jsonl"
    corpus.touch()

    def dry(**variables: Any) -> str:
        done = bash("launch_retriever.sh", "--dry-run", env={**trainer, **variables})
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(**variables: Any) -> str:
        done = bash("launch_retriever.sh", "--dry-run", env={**trainer, **variables})
        assert done.returncode == 1
        return done.stderr

    module = "-m verl.utils.siop.retriever"
    folder = {"RETRIEVER_CORPUS_DIR": data}
    # By words, indexed first unless that was done.
    shown = dry(**folder)
    assert f"{module}.build bm25 --corpus {corpus}\n" in shown and f"{module}.server --corpus {corpus} --host" in shown
    built = Path(f"{corpus}.bm25", "manifest.json")
    built.parent.mkdir()
    built.touch()
    os.utime(corpus, (1e9, 1e9))
    assert "first: " not in dry(**folder)
    os.utime(built, (1e9 - 1, 1e9 - 1))  # of an older corpus
    assert f"{module}.build bm25 --corpus {corpus}\n" in dry(**folder)
    built.touch()
    with corpus.open("wb") as file:
        file.truncate(200 * 2**20)
    assert f"{module}.build bm25 --corpus {corpus}\n" in dry(**folder)
    assert "RETRIEVER_GPUS=0 has no effect" in refused(**folder, RETRIEVER_GPUS="0")
    assert "RETRIEVER_MODEL=m has no effect" in refused(**folder, RETRIEVER_MODEL="m")
    # By vectors: computed, or those that are published.
    shown = dry(**folder, RETRIEVER_NAME="e5", RETRIEVER_MODEL="m", RETRIEVER_FAISS_GPU="0")
    assert f"{module}.build encode --corpus {corpus} --index {corpus}.flat --model m\n" in shown
    assert f"{module}.server --corpus {corpus} --index {corpus}.flat --model m --devices cpu --host" in shown
    index = data / "e5_Flat.index"
    index.touch()
    assert f"{module}.build import --faiss {index} --corpus {corpus} --index {corpus}.flat\n" in dry(**folder)
    assert "import" not in dry(**folder, RETRIEVER_NAME="bm25")
    other = {"RETRIEVER_INDEX_FILE": tmp_path / "v", "RETRIEVER_CORPUS_FILE": corpus}
    assert "v: there is no such file" in refused(**other)
    assert f"RETRIEVER_INDEX_FILE={tmp_path}/v has no effect" in refused(**other, RETRIEVER_NAME="bm25")
    assert "RETRIEVER_FAISS_GPU=1, but this machine has no GPU" in refused(**folder, RETRIEVER_FAISS_GPU="1")
    assert "RETRIEVER_NAME=colbert is not allowed: bm25 or e5" in refused(**folder, RETRIEVER_NAME="colbert")
    Path(f"{corpus}.flat").mkdir()
    Path(f"{corpus}.flat/manifest.json").touch()
    assert "first: " not in dry(**folder) and f"--index {corpus}.flat" in dry(**folder)
    # An index as it is.
    ready = tmp_path / "ready"
    ready.mkdir()
    (ready / "manifest.json").touch()
    shown = dry(RETRIEVER_INDEX_DIR=ready, RETRIEVER_MODEL="m")
    assert "first: " not in shown and f"{module}.server --index {ready} --model m --host" in shown


def test_a_dry_run_shows_the_configuration_and_starts_nothing(tmp_path: Path) -> None:
    env = {**NAMED, "OUTPUT_DIR": tmp_path / "out", "LOG_DIR": tmp_path / "logs", "N_GPUS_PER_NODE": "0"}
    secret = {"SIOP_API_TOKEN": "hush", "SERPER_API_KEY": "hush"}
    done = bash("train_siop.sh", "--dry-run", "algorithm.siop_lambda=0.25", env={**env, **secret})
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  SIOP_API_TOKEN +set$", done.stdout, re.MULTILINE) and "hush" not in done.stdout + done.stderr
    assert "siop_lambda: 0.25" in done.stdout and f"default_local_dir: {tmp_path}/out" in done.stdout
    assert not (tmp_path / "out").exists() and not (tmp_path / "logs").exists()


# --- the table -------------------------------------------------------------------------------------------------------


def test_defaults_in_the_table_are_those_of_the_configuration() -> None:
    with initialize_config_dir(str(ROOT / "verl" / "trainer" / "siop" / "config"), version_base=None):
        config = compose("siop_trainer")
    plain = re.compile(r"-?[\d.]+|true|false|auto|siop")
    checked = 0
    for row in variables.TABLE:
        if not row.target or row.target.startswith("--") or not plain.fullmatch(row.default):
            continue
        found = config
        for part in row.target.split("."):
            found = found[part]
        same = found == float(row.default) if row.default[-1].isdigit() else str(found).lower() == row.default
        assert same, f"{row.name}: {row.default} in the table, {found} in the configuration"
        checked += 1
    assert checked > 15


def test_the_readme_has_the_table() -> None:
    assert variables.readme() in (ROOT / "README.md").read_text()


PROGRAM = {
    "train_siop.sh": "train",
    "eval_siop.sh": "eval",
    "launch_siop_scorer.sh": "scorer",
    "launch_retriever.sh": "retriever",
    "quickstart.sh": "quickstart",
}


@pytest.mark.parametrize("script", PROGRAM)
def test_help_names_every_variable_that_is_read(script: str) -> None:
    text = (ROOT / script).read_text()
    read = set(re.findall(r"\$\{!?([A-Z][A-Z_]+):[-+]", text)) - {"BASH_SOURCE", "OPTIONS", "OVERRIDES"}
    if script == "quickstart.sh":
        read -= {"RETRIEVER_PORT", "SIOP_PORT"}  # set by itself
    if script == "launch_retriever.sh":
        read.discard("CONDA_ENV")
    shown = bash(script, "--help")
    assert shown.returncode == 0
    names = {row.name for row in variables.of(PROGRAM[script])}
    assert names <= set(re.findall(r"^  ([A-Z][A-Z_]+) ", shown.stdout, re.MULTILINE))
    assert read <= names


@pytest.mark.parametrize("script", ["scripts/setup_env.sh", "run_tests.sh"])
def test_scripts_of_the_project_have_help(script: str) -> None:
    shown = bash(script, "--help")
    assert shown.returncode == 0 and "PYTHON" in shown.stdout


def test_the_table_runs_without_any_package() -> None:
    command = [sys.executable, "-I", "-S", "scripts/launch_variables.py", "show", "train"]
    done = subprocess.run(command, cwd=ROOT, env={"SIOP_API_TOKEN": "hush"}, capture_output=True, text=True)
    assert done.returncode == 0 and "hush" not in done.stdout and "TRAIN_FILE" in done.stdout
