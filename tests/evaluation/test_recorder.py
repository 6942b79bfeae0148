"""From a validation's rollouts to the files of an evaluation. A whole evaluation is in the test of the release's
commands."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transfer_queue as tq
from fake_retriever import HEALTH, FakeRetriever
from hydra import compose, initialize_config_module
from method_helpers import byte_tokenizer
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.trainer.siop.checks import retrievers
from verl.trainer.siop.checks.retrievers import RetrieverUnavailable
from verl.trainer.siop.evaluation import identity
from verl.trainer.siop.evaluation.compare import check_comparable
from verl.trainer.siop.evaluation.manifest import read_evaluation
from verl.trainer.siop.evaluation.questions import EvaluationError
from verl.trainer.siop.evaluation.recorder import Recorder
from verl.trainer.siop.rollouts.tool_calls import FIELD, ToolRecord
from verl.utils.siop.errors import SiopConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def retriever(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRetriever]:
    monkeypatch.setattr(retrievers, "_PAUSE_S", 0)
    with FakeRetriever() as service:
        monkeypatch.setenv("RETRIEVER_URL", service.url)
        yield service


def configuration(folder: Path, *overrides: str) -> DictConfig:
    model = folder / "global_step_7" / "actor" / "huggingface"
    model.mkdir(parents=True, exist_ok=True)
    (model / "model.safetensors").write_bytes(b"weights")
    (folder / "test.parquet").write_bytes(b"rows")
    named = [f"actor_rollout_ref.model.path={model}", f"data.val_files={folder}/test.parquet", "data.train_files=x"]
    tools = f"actor_rollout_ref.rollout.multi_turn.tool_config_path={ROOT}/config/local_search_tool_config.yaml"
    with initialize_config_module("verl.trainer.siop.config", version_base=None):
        path = "hydra.searchpath=[pkg://verl.trainer.config]"
        return compose("siop_trainer", overrides=[path, "hardware=cpu", tools, *named, *overrides])


def row(prompt: str, answer: str, **extra: Any) -> dict[str, Any]:
    ids = list(byte_tokenizer()(f"<answer>{answer}</answer>")["input_ids"])
    return {
        "data_source": "nq",
        "raw_prompt": [{"role": "user", "content": prompt}],
        "reward_model": {"ground_truth": "Paris"},
        "extra_info": {"reachable": True, **extra},
        "responses": torch.tensor(ids),
        "response_mask": torch.ones(len(ids), dtype=torch.long),
        "extra_fields": {FIELD: ToolRecord().as_dict()},
    }


def record(
    monkeypatch: pytest.MonkeyPatch, folder: Path, config: DictConfig, rows: dict[str, dict[str, Any]], out: str = "out"
) -> Recorder:
    """A recorder that has seen these rollouts, each under its key of TransferQueue."""

    def get(keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, Any]:
        assert partition_id == "val"
        return {name: [rows[key][name] for key in keys] for name in select_fields}

    monkeypatch.setattr(tq, "kv_batch_get", get)
    recorder = Recorder(folder / out, config, byte_tokenizer())
    for key in rows:
        recorder.note(KVBatchMeta(partition_id="val", keys=[key], tags=[{}]))
    return recorder


ROWS = {"u1_0_0": row("Where?", "Paris"), "u2_0_0": row("Who?", "Rome", id="test_5")}


def test_an_evaluation_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, retriever: FakeRetriever) -> None:
    config = configuration(tmp_path)
    record(monkeypatch, tmp_path, config, ROWS).finish()
    manifest, samples = read_evaluation(tmp_path / "out")
    assert {(sample.question, sample.em, sample.answer) for sample in samples} == {
        ("Where?", 1.0, "Paris"),
        ("Who?", 0.0, "Rome"),
    }
    assert manifest.model["step"] == 7 and manifest.model["weight_files"] == 1
    assert manifest.data["sha256"] == [hashlib.sha256(b"rows").hexdigest()]
    assert manifest.data["manifest_sha256"] == [None] and manifest.data["questions"] == 2
    assert manifest.retriever == {retriever.url: HEALTH}
    assert manifest.tools["search"] == {
        "class": "LocalSearchTool",
        "schema_sha256": manifest.tools["search"]["schema_sha256"],
        "topk": 3,
        "max_chars": 2048,
    }
    assert manifest.decoding["n"] == 1 and manifest.decoding["temperature"] == 0
    assert manifest.decoding["max_assistant_turns"] == 5 and manifest.decoding["max_response_tokens"] == 6144
    assert manifest.probe["prefix"] == config.algorithm.siop_reference_prefix
    assert {"verl", "torch", "transformers", "siop-verl", "hf_cpu"} == set(manifest.versions)
    assert manifest.sets["nq"].unreachable == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "questions.jsonl"]


def test_the_same_data_has_the_same_digests_whatever_the_uids_and_the_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, retriever: FakeRetriever
) -> None:
    config = configuration(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    one = record(monkeypatch, tmp_path, config, ROWS).finish()
    swapped = {"u8_0_0": ROWS["u2_0_0"], "u9_0_0": ROWS["u1_0_0"]}
    two = record(monkeypatch, tmp_path, config, swapped, "two").finish()
    assert (one.data, one.prompt, one.questions_sha256) == (two.data, two.prompt, two.questions_sha256)
    assert one.data["manifest_sha256"] == [hashlib.sha256(b"{}").hexdigest()]
    other = {"u1_0_0": row("Answer. Where?", "Paris", question="Where?"), "u2_0_0": ROWS["u2_0_0"]}
    three = record(monkeypatch, tmp_path, config, other, "three").finish()
    assert one.data == three.data and one.prompt != three.prompt
    four = record(monkeypatch, tmp_path, config, {"u1_0_0": ROWS["u1_0_0"]}, "four").finish()
    assert one.data["ids_sha256"] != four.data["ids_sha256"]


def test_of_a_session_the_last_trajectory_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, retriever: FakeRetriever
) -> None:
    rows = {"u_0_0": row("Where?", "no"), "u_0_1": row("Where?", "Paris"), "u_1_0": row("Where?", "Rome")}
    recorder = record(monkeypatch, tmp_path, configuration(tmp_path), {})
    monkeypatch.setattr(
        tq, "kv_batch_get", lambda keys, select_fields, **_: {f: [rows[k][f] for k in keys] for f in select_fields}
    )
    recorder.note(KVBatchMeta(partition_id="val", keys=["u_0_1", "u_0_0", "u_1_0"], tags=[{}] * 3))
    recorder.finish()
    _, samples = read_evaluation(tmp_path / "out")
    assert [(sample.sample, sample.answer) for sample in samples] == [(0, "Paris"), (1, "Rome")]


def test_a_new_evaluation_takes_the_old_ones_place_when_it_is_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, retriever: FakeRetriever
) -> None:
    one = record(monkeypatch, tmp_path, configuration(tmp_path), ROWS).finish()
    other = {"u1_0_0": ROWS["u1_0_0"]}
    recorder = record(monkeypatch, tmp_path, configuration(tmp_path), other)  # interrupted
    assert read_evaluation(tmp_path / "out")[0] == one
    with pytest.raises(EvaluationError, match="no question was evaluated"):
        record(monkeypatch, tmp_path, configuration(tmp_path), {}).finish()
    retriever.health = {**HEALTH, "documents": 8}
    with pytest.raises(EvaluationError, match="documents is 9 at the start, 8 at the end; evaluate again"):
        recorder.finish()
    assert read_evaluation(tmp_path / "out")[0] == one
    record(monkeypatch, tmp_path, configuration(tmp_path), other).finish()
    assert read_evaluation(tmp_path / "out")[0].data["questions"] == 1


def test_a_retriever_that_does_not_answer_is_an_error_that_says_how_to_start_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, retriever: FakeRetriever
) -> None:
    recorder = record(monkeypatch, tmp_path, configuration(tmp_path), ROWS)
    with FakeRetriever() as other:
        monkeypatch.setenv("RETRIEVER_URL", f"{retriever.url},{other.url}")
        Recorder(tmp_path / "two", configuration(tmp_path), byte_tokenizer())
    # Of two the one that is down is named, and no difference is.
    expected = rf"no answer from the retriever at {other.url} \(RETRIEVER_URL\): ConnectError.*bash launch_retriever.sh"
    with pytest.raises(RetrieverUnavailable, match=expected):
        Recorder(tmp_path / "two", configuration(tmp_path), byte_tokenizer())
    retriever.close()
    with pytest.raises(RetrieverUnavailable, match="no answer from the retriever"):
        recorder.finish()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("later", [{**HEALTH, "corpus_sha256": "72"}, None])
def test_a_retriever_that_changes_spoils_the_evaluation(
    later: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, retriever: FakeRetriever
) -> None:
    recorder = record(monkeypatch, tmp_path, configuration(tmp_path), ROWS)
    retriever.health = later
    with pytest.raises(EvaluationError, match=rf"{retriever.url} has changed during the evaluation: .*; eval"):
        recorder.finish()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("health", [None, ["a list"]])
def test_a_retriever_without_health_is_written_down_as_unknown(
    health: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    retriever: FakeRetriever,
    caplog: pytest.LogCaptureFixture,
) -> None:
    retriever.health = health
    manifest = record(monkeypatch, tmp_path, configuration(tmp_path), ROWS).finish()
    assert manifest.retriever == {retriever.url: None} and "does not say what it serves" in caplog.text


def test_the_web_is_written_down_as_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "k")
    monkeypatch.setenv("SERPER_CACHE_DIR", "")
    tools = f"actor_rollout_ref.rollout.multi_turn.tool_config_path={ROOT}/config/serper_tool_config.yaml"
    manifest = record(monkeypatch, tmp_path, configuration(tmp_path, tools), ROWS).finish()
    assert manifest.retriever == {"https://google.serper.dev/search": None}
    with pytest.raises(EvaluationError, match=r"retriever: \[None\] \| \[None\]"):
        check_comparable(manifest, manifest)


def test_replicas_that_serve_different_things_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, retriever: FakeRetriever
) -> None:
    with FakeRetriever() as other:
        monkeypatch.setenv("RETRIEVER_URL", f"{retriever.url},{other.url}")
        assert len(record(monkeypatch, tmp_path, configuration(tmp_path), ROWS).finish().retriever) == 2
        expected = rf"do not serve the same: documents is 9 at {retriever.url}, 8 at {other.url}$"
        other.health = {**HEALTH, "documents": 8}
        with pytest.raises(SiopConfigError, match=expected):
            Recorder(tmp_path / "out", configuration(tmp_path), byte_tokenizer())
        other.health = None
        with pytest.raises(SiopConfigError, match=rf"a usable /health at {retriever.url}, and none at {other.url}$"):
            Recorder(tmp_path / "out", configuration(tmp_path), byte_tokenizer())


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_the_digest_of_a_checkpoint_is_that_of_its_weights(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    folder = Path(config.actor_rollout_ref.model.path)
    one = identity.model_of(config)
    # Neither what is no weight, nor formats that transformers passes over.
    for name in ("training_args.bin", "pytorch_model.bin", "config.json"):
        (folder / name).write_bytes(b"else")
    assert identity.model_of(config) == one
    (folder / "model.safetensors").write_bytes(b"weightz")
    two = identity.model_of(config)
    assert two["weights"] != one["weights"] and two["step"] == one["step"] == 7
    (folder / "model.safetensors").unlink()
    assert identity.model_of(config)["weights"] not in (one["weights"], two["weights"])


def test_a_sharded_checkpoint_is_hashed_where_it_is_resumed_from(tmp_path: Path) -> None:
    step = tmp_path / "global_step_9"
    config = configuration(tmp_path, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={step}")
    actor = step / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface" / "model.safetensors").write_bytes(b"a copy that is not loaded")
    with pytest.raises(EvaluationError, match=r"global_step_9/actor has no weights \(\*\.safetensors"):
        identity.model_of(config)
    for rank in range(2):
        (actor / f"model_world_size_2_rank_{rank}.pt").write_bytes(bytes(rank))
        (actor / f"optim_world_size_2_rank_{rank}.pt").write_bytes(b"optimizer")
    found = identity.model_of(config)
    assert (found["checkpoint"], found["step"], found["weight_files"]) == (str(step), 9, 2)
    (actor / "optim_world_size_2_rank_0.pt").write_bytes(b"other")
    assert identity.model_of(config) == found


def test_a_model_that_is_nowhere_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = configuration(tmp_path)
    config.actor_rollout_ref.model.path = "siop/no-such-model"
    with pytest.raises(EvaluationError, match="siop/no-such-model: neither a folder nor a model in the hub's cache"):
        identity.model_of(config)
