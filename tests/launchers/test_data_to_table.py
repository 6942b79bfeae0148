"""From published questions and passages to a table: data, dense index, scorer, training of two steps, evaluation."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from corpora import write_corpus
from data_trees import flashrag_tree
from dense_world import minilm
from launching import Environment, bash
from preflight_world import HERMES, TOOL_TEMPLATE, model_with_template
from scorer_process import free_port
from tiny_models import save_causal_lm
from verl.trainer.siop.evaluation.manifest import read_evaluation

ROOT = Path(__file__).parents[2]
PASSAGES = [f'"Person {i}"\nPerson {i} of nq is who number {i} was.' for i in range(40)]


def data(*arguments: object) -> str:
    command = [sys.executable, "-m", "verl.utils.siop.data", *map(str, arguments)]
    return ok(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False))


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny = save_causal_lm(folder / "tiny", max_position_embeddings=6144)
    return model_with_template(tiny, folder, TOOL_TEMPLATE.replace("CALL", HERMES))


@pytest.fixture(scope="module")
def services(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("services")
    retriever, scorer = str(free_port()), str(free_port())
    env: Environment = {
        "LOG_DIR": folder / "logs",
        "MODEL_PATH": model,
        "N_GPUS_PER_NODE": "0",
        "RETRIEVER_PORT": retriever,
        "RETRIEVER_URL": f"http://localhost:{retriever}/retrieve",
        "SIOP_PORT": scorer,
        "SIOP_SCORER_URL": f"http://localhost:{scorer}",
    }
    corpus = write_corpus(folder / "corpus.jsonl", PASSAGES)
    dense = {"RETRIEVER_CORPUS_FILE": corpus, "RETRIEVER_NAME": "e5", "RETRIEVER_MODEL": minilm()}
    try:
        started = ok(bash("launch_retriever.sh", env={**env, **dense}))
        assert f"vectors of {minilm()} over {corpus}" in started
        ok(bash("launch_siop_scorer.sh", env={**env, "SIOP_MODEL": model, "SIOP_NUM_GPUS": "0"}))
        yield env
    finally:
        for service in ("launch_retriever.sh", "launch_siop_scorer.sh"):
            bash(service, "stop", env=env)


def test_the_index_is_built_once_and_finds_passages(services: Environment) -> None:
    query = {"queries": ["Person 7"], "topk": 1, "return_scores": True}
    ((hit,),) = httpx.post(services["RETRIEVER_URL"], json=query, timeout=30).json()["result"]
    assert hit["document"]["contents"] == PASSAGES[7]
    health = httpx.get(services["RETRIEVER_URL"].replace("/retrieve", "/health"), timeout=30).json()
    assert health["kind"] == "flat" and health["documents"] == len(PASSAGES) and health["recall"] == "exact"


def test_data_training_and_evaluation(services: Environment, model: str, tmp_path: Path) -> None:
    questions = tmp_path / "questions"
    sizes = ("--train-per-set", 8, "--eval-per-set", 3)
    sets = ("--train", "nq", "--eval", "nq,bamboogle")
    tree = flashrag_tree(tmp_path / "tree")
    built = data("build", "--preset", "searchr1", "--source", tree, *sets, *sizes, "--model", model, "--out", questions)
    assert f"use it with DATA_DIR={questions}" in built
    assert "up to date" in data("build", "--preset", "searchr1", "--source", tree, *sets, *sizes, "--model", model,
                                "--out", questions)  # fmt: skip
    shown = data("show", questions, "--row", 1, "--model", model)
    assert "search" in shown and "who is number" in shown

    limits = {"MAX_PROMPT_LENGTH": "4000", "MAX_RESPONSE_LENGTH": "160", "MAX_ASSISTANT_TURNS": "2"}
    train = {
        **services,
        **limits,
        "DATA_DIR": questions,
        "OUTPUT_DIR": tmp_path / "out",
        "TRAIN_BATCH_SIZE": "4",
        "PPO_MINI_BATCH_SIZE": "4",
        "ROLLOUT_N": "2",
        "SAVE_FREQ": "2",
        "TEST_FREQ": "-1",
    }
    # Random weights answer nothing, which would be said.
    ok(bash("train_siop.sh", "trainer.total_training_steps=2", "algorithm.siop_on_nothing_learnt=warn", env=train))
    assert (tmp_path / "out" / "global_step_2" / "actor").is_dir()

    # Real questions, of the package fanoutqa.
    spec = importlib.util.find_spec("fanoutqa")
    assert spec and spec.submodule_search_locations, "pip install --no-deps fanoutqa"
    published = Path(spec.submodule_search_locations[0]) / "data" / "fanout-final-dev.json"
    real = tmp_path / "real"
    data("build", "--source", f"eval:fanoutqa={published}", "--eval-per-set", 4, "--model", model, "--out", real)
    assert pq.read_table(real / "eval.parquet").num_rows == 4

    tables = []
    for name, folder in (("held-out", questions), ("real", real)):
        out = tmp_path / f"eval-{name}"
        checkpoint = {"CHECKPOINT_PATH": tmp_path / "out" / "global_step_2", "DATA_DIR": folder, "OUTPUT_DIR": out}
        tables.append(ok(bash("eval_siop.sh", env={**services, **limits, **checkpoint})))
        manifest, samples = read_evaluation(out)
        (health,) = manifest.retriever.values()
        assert health["kind"] == "flat" and health["encoder"]["model"]
        rows = pq.read_table(folder / "eval.parquet").to_pylist()
        assert {sample.id for sample in samples} == {row["extra_info"]["id"] for row in rows}
    assert "nq" in tables[0] and "bamboogle" in tables[0] and "fanoutqa" in tables[1]
    compare = [sys.executable, "-m", "verl.trainer.siop.report", "compare", "eval-held-out", "eval-real"]
    refused = subprocess.run(compare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "data" in refused.stderr
    assert json.loads((real / "manifest.json").read_text())
