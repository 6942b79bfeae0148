"""Before a run: the retrievers of its search tools answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_retriever import HEALTH, FakeRetriever
from preflight_world import MULTI_TURN, SEARCH_TOOL, Parts, changed, right_parts, write_tools
from scorer_process import free_port
from toy_training import ToyTraining, small_world
from verl.trainer.siop.checks import retrievers, services
from verl.trainer.siop.checks.retrievers import RetrieverUnavailable
from verl.trainer.siop.checks.services import check_scorer
from verl.trainer.siop.preflight import check_before_start
from verl.utils.siop.errors import ScorerUnavailable, SiopConfigError
from verl.utils.siop.siop_process_reward import SiopConfig

EVALUATES = ("trainer.val_only=true", "trainer.val_before_train=true")


@pytest.fixture
def retriever() -> Iterator[FakeRetriever]:
    with FakeRetriever() as service:
        yield service


@pytest.fixture
def parts(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(retrievers, "_PAUSE_S", 0)
    # It renders no tools, which is said, and no more. The web is not asked: each query has its price.
    web = {"class_name": "verl.tools.serper_search_tool.SerperSearchTool", "config": {"type": "native", "api_key": "k"}}
    return {
        **right_parts(tmp_path, tiny_model),
        "algorithm.adv_estimator": "grpo",
        "data.max_prompt_length": "2048",
        f"{MULTI_TURN}.tool_config_path": write_tools(tmp_path / "tools.yaml", _searching("${oc.env:RETRIEVER_URL}")),
        "web": write_tools(tmp_path / "web.yaml", web),
    }


def _searching(url: str) -> dict[str, object]:
    return {**SEARCH_TOOL, "config": {**SEARCH_TOOL["config"], "retrieval_service_url": url, "max_retries": 0}}


def _check(parts: Parts, *overrides: str) -> None:
    check_before_start(changed({key: value for key, value in parts.items() if key != "web"}, *overrides))


@pytest.mark.parametrize("run", [(), EVALUATES])
def test_a_run_needs_its_retriever(
    parts: Parts, run: tuple[str, ...], retriever: FakeRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRIEVER_URL", retriever.url)
    _check(parts, *run)
    assert [body["queries"] for body in retriever.asked] == [["who?"]]
    retriever.close()
    expected = rf"no answer from the retriever at {retriever.url} \(RETRIEVER_URL\): .*; start it with bash launch_retr"
    with pytest.raises(RetrieverUnavailable, match=expected):
        _check(parts, *run)


def test_a_web_search_is_not_asked(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # nothing gets out
    _check({**parts, f"{MULTI_TURN}.tool_config_path": parts["web"]})


def test_an_evaluation_needs_replicas_that_serve_the_same(
    parts: Parts, retriever: FakeRetriever, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeRetriever() as other:
        monkeypatch.setenv("RETRIEVER_URL", f"{retriever.url},{other.url}")
        _check(parts, *EVALUATES)
        other.health = {**HEALTH, "corpus_sha256": "72"}
        _check(parts)
        with pytest.raises(SiopConfigError, match=rf"corpus_sha256 is '71' at {retriever.url}, '72' at {other.url}"):
            _check(parts, *EVALUATES)
        retriever.health = other.health = None
        caplog.clear()
        _check(parts)  # a training writes nothing down about it
        assert "does not say what it serves" not in caplog.text
        _check(parts, *EVALUATES)
        assert caplog.text.count("does not say what it serves") == 2


def test_a_dead_retriever_ends_a_run_before_a_model_is_loaded(tmp_path: Path) -> None:
    world = small_world(tmp_path / "toy")
    url = f"http://127.0.0.1:{free_port()}/retrieve"
    run = ToyTraining(world, tmp_path, "ablation=grpo", env={"RETRIEVER_URL": url})
    assert run.wait(120) == 1, run.report()
    assert run.printed[-2].startswith(f"error: no answer from the retriever at {url} (RETRIEVER_URL)"), run.report()
    assert not any("loading the models" in line for line in run.printed)


# --- the scorer -------------------------------------------------------------------------------------------------------


def test_what_is_waited_for_is_said_and_the_error_names_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_PATIENCE_S", 0.1)
    url, said = f"http://127.0.0.1:{free_port()}", list[str]()
    siop = SiopConfig(siop_scorer_url=url)
    with pytest.raises(ScorerUnavailable, match=r"bash launch_siop_scorer\.sh"):
        asyncio.run(check_scorer(siop, None, said.append, 0.3, say=said.append))
    assert len(said) == 1 and said[0].startswith(f"waiting for the scorer at {url}, 0.3 s at most: "), said
