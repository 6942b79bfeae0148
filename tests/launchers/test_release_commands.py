"""The commands of the first release's README, as they stand there, on toy inputs: retriever, scorer, training of two
steps, evaluation."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Environment, bash
from scorer_process import free_port
from verl.trainer.siop.evaluation.manifest import read_evaluation
from verl.trainer.siop.report import read_metrics, report

from examples.toy_world import build


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """The release's variables, with a small toy world as the user's model, data and corpus."""
    folder = tmp_path_factory.mktemp("release")
    toy = folder / "data"
    small = ["--train-questions", "16", "--eval-questions", "8", "--copying-steps", "40", "--imperfect-steps", "20"]
    assert build.main(["--out", str(toy), "--threads", "1", *small]) == 0
    (toy / "corpus.jsonl").rename(toy / "wiki-18.jsonl")
    retriever, scorer = str(free_port()), str(free_port())
    env: Environment = {
        "LOG_DIR": folder / "logs",
        # Beyond the README's commands: other ports than the defaults, and the limits of a model with 64 positions.
        "RETRIEVER_PORT": retriever,
        "RETRIEVER_URL": f"http://localhost:{retriever}/retrieve",
        "SIOP_PORT": scorer,
        "SIOP_SCORER_URL": f"http://localhost:{scorer}",
        "TOOL_CONFIG": toy / "tool_config.yaml",
        "MODEL_PATH": toy / "model",
        "TRAIN_FILE": toy / "train.parquet",
        "VAL_FILE": toy / "eval.parquet",
        "N_GPUS_PER_NODE": "0",
        "SIOP_NUM_GPUS": "0",
    }
    try:
        yield env
    finally:
        for service in ("launch_retriever.sh", "launch_siop_scorer.sh"):
            bash(service, "stop", env=env)


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_commands_of_the_release(release: Environment, tmp_path: Path) -> None:
    data = Path(release["MODEL_PATH"]).parent
    ok(bash("launch_retriever.sh", env={**release, "RETRIEVER_CORPUS_DIR": data}))
    ok(bash("launch_siop_scorer.sh", env={**release, "SIOP_MODEL": data / "model"}))
    with urllib.request.urlopen(f"{release['SIOP_SCORER_URL']}/health", timeout=10) as answer:
        assert json.loads(answer.read())["status"] == "healthy"
    logs = Path(release["LOG_DIR"])
    assert {"retrieval_server.log", "siop_scorer.log"} <= {path.name for path in logs.iterdir()}
    for service in ("retrieval_server", "siop_scorer"):
        process = (logs / f"{service}.pid").read_text().strip()
        assert "VERL_USE_EXTERNAL_PLUGINS=none" in Path(f"/proc/{process}/environ").read_text().split("\0")

    train = {
        **release,
        "OUTPUT_DIR": tmp_path / "siop",
        "TRAIN_BATCH_SIZE": "8",
        "PPO_MINI_BATCH_SIZE": "8",
        "ROLLOUT_N": "4",
        "SAVE_FREQ": "1",
        "TEST_FREQ": "-1",
        "TRAINER_LOGGER": "[console]",
    }
    # The release's launcher passed our keys with a plus. `experiment=toy` is the length of the toy world's texts.
    words = ["experiment=toy", "+algorithm.siop_lambda=0.5", "trainer.total_training_steps=2"]
    # Two steps of a model that knows next to nothing may well teach nothing, which would be said.
    ok(bash("train_siop.sh", *words, "algorithm.siop_on_nothing_learnt=warn", env=train))
    assert (tmp_path / "siop" / "global_step_2" / "actor").is_dir()
    dumps = (tmp_path / "siop" / "rollouts").glob("[0-9]*.jsonl")
    assert sorted(path.name for path in dumps) == ["1.jsonl", "2.jsonl"]
    assert (logs / "siop_train.log").is_file()

    evaluate = {**release, "CHECKPOINT_PATH": tmp_path / "siop" / "global_step_2", "OUTPUT_DIR": tmp_path / "eval"}
    table = ok(bash("eval_siop.sh", "experiment=toy", env=evaluate))
    assert "toy_two_hop" in table and "mean turns" in table
    rows = (tmp_path / "eval" / "validation" / "0.jsonl").read_text().splitlines()
    assert len(rows) == 8 and "8 of 8 questions" in table
    assert "validation: 8 of 8 questions" in (logs / "siop_eval.log").read_text()

    # What the evaluation left agrees with what verl counted, and names what was evaluated.
    manifest, samples = read_evaluation(tmp_path / "eval")
    metrics = read_metrics(tmp_path / "eval" / "validation")
    assert report(tmp_path / "eval") == table[table.index("data source ") :].rstrip("\n")
    assert len(samples) == 8 and {sample.data_source for sample in samples} == {"toy_two_hop"}
    for name in ("em", "f1"):
        scored = manifest.average.scores[name].value
        assert scored == pytest.approx(metrics[f"val-core/average/{name}/mean@1"])
    assert manifest.average.means["turns"] == pytest.approx(metrics["val-aux/turns/mean"])
    assert manifest.average.means["response_tokens"] == pytest.approx(metrics["val-aux/response_tokens/mean"])
    outputs = [json.loads(row)["output"] for row in rows]
    assert all(any(sample.answer in output for output in outputs) for sample in samples)
    assert manifest.model["step"] == 2 and manifest.model["checkpoint"].startswith(f"{tmp_path}/siop/global_step_2")
    assert manifest.decoding["temperature"] == 0 and manifest.decoding["n"] == 1
    (health,) = manifest.retriever.values()
    assert health["documents"] == len((data / "wiki-18.jsonl").read_text().splitlines())
