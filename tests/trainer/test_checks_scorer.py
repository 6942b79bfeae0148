"""The scorer reads token ids as the policy does; and no other trainer trains with the siop estimator."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict
from preflight_world import Parts, changed, check, health_of_scorer, right_parts
from scorer_process import ScorerProcess
from tensordict import TensorDict
from tiny_models import BYTE_TOKENIZER, save_causal_lm, tiny_causal_lm
from transformers import AutoTokenizer
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.siop.checks.policy import load_policy
from verl.trainer.siop.checks.services import check_scorer
from verl.trainer.siop.preflight import SEARCH, check_before_start
from verl.utils.siop.errors import ScorerError, ScorerUnavailable, SiopConfigError
from verl.utils.siop.siop_process_reward import SiopConfig
from verl.utils.siop.tokenizer_digest import largest_id, tokenizer_digest

from examples.toy_world.tokenizer import build_tokenizer


@pytest.fixture
def parts(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    return right_parts(tmp_path, tiny_model)


def _tokenizer(parts: Parts) -> Any:
    return load_policy(changed(parts)).tokenizer


# --- the digest -------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_ids_and_tokens_alone(tmp_path: Path) -> None:
    one = AutoTokenizer.from_pretrained(BYTE_TOKENIZER)
    digest = tokenizer_digest(one)
    one.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.chat_template = "other"
    assert tokenizer_digest(again) == digest and len(digest) == 64
    assert largest_id(again) == max(again.get_vocab().values())
    again.add_tokens(["<think>"])
    assert tokenizer_digest(again) != digest
    assert tokenizer_digest(build_tokenizer(["a", "b"])) != tokenizer_digest(build_tokenizer(["b", "a"]))


def test_a_scorer_with_the_policys_tokenizer_passes(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = _tokenizer(parts)
    with health_of_scorer(
        engine="vllm", model="same", tokenizer=tokenizer_digest(tokenizer), vocab_size=largest_id(tokenizer) + 1
    ) as url:
        check(parts, algorithm__siop_scorer_url=url)
    assert "could not be checked" not in caplog.text


@pytest.mark.parametrize(("measured", "counts"), [(0.0, 1e-5), (3e-6, 1e-5), (4e-3, 4e-3)])
def test_the_scorers_noise_is_measured_at_start(parts: Parts, measured: float, counts: float) -> None:
    with health_of_scorer(engine="vllm", model="same", nli="org/deberta", noise=measured) as url:
        address = f"algorithm.siop_scorer_url={url}"
        config = changed(parts, address)
        said: list[str] = []
        check_before_start(config, said.append, without=[SEARCH])
        assert config.algorithm.siop_scorer_noise == pytest.approx(counts, rel=1e-6)
        prompts, scorer = said[-2:]
        assert (
            prompts.startswith("prompts  answer tags, probes as '<answer>\\n…") and "(by the chat template)" in prompts
        )
        assert scorer.startswith(f"scorer   {url}: same (vllm)") and scorer.endswith(f"; noise {measured:.1e}")
        # Whoever asks for no support has no noise to measure.
        config = changed(parts, address, "algorithm.siop_reward_mode=cluster_frequency")
        check_before_start(config, without=[SEARCH])
        assert config.algorithm.siop_scorer_noise == 1e-5


@pytest.mark.parametrize(
    ("health", "message"),
    [
        ({"tokenizer": "0" * 64}, "their tokenizers differ, so that the policy's token ids would be scored as other"),
        ({"vocab_size": 100}, r"ids up to 25\d, the scorer's embedding has 100 rows"),
        ({"vocab_size": "10"}, r"the scorer says vocab_size='10', which is no whole number"),
    ],
)
def test_another_tokenizer_is_refused_with_both_models(parts: Parts, health: dict[str, Any], message: str) -> None:
    with health_of_scorer(engine="vllm", model="other/model", **health) as url:
        with pytest.raises(SiopConfigError, match=message) as error:
            check(parts, algorithm__siop_scorer_url=url)
        assert "other/model" in str(error.value) and parts["actor_rollout_ref.model.path"] in str(error.value)
        # Who measures support with the policy itself sends the scorer no ids.
        check(parts, algorithm__siop_scorer_url=url, algorithm__siop_scorer="policy")


def test_a_scorer_that_tells_no_digest_is_warned_about(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    with health_of_scorer(engine="vllm", model="old") as url:
        check(parts, algorithm__siop_scorer_url=url)
    assert "tells no digest of its tokenizer" in caplog.text and "majority voting" in caplog.text


def test_what_a_scorer_that_compares_words_cannot_do_is_said_once(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    with health_of_scorer(engine="vllm", model="same", nli="lexical") as url:
        check(parts, algorithm__siop_scorer_url=url)
    assert caplog.text.count("has no NLI model and compares words") == 1 and "SIOP_NLI_MODEL" in caplog.text
    caplog.clear()
    with health_of_scorer(engine="vllm", model="same", nli="org/deberta") as url:
        check(parts, algorithm__siop_scorer_url=url)
    with health_of_scorer(engine="vllm", model="same", nli="lexical") as url:
        check(parts, algorithm__siop_scorer_url=url, algorithm__siop_use_gold_ref="true")  # asks for neither
    assert "compares words" not in caplog.text


def test_answers_that_are_no_scores_are_told_with_their_address(parts: Parts) -> None:
    """The doctor's question, to something that answers everything with a page of its own."""
    policy = load_policy(changed(parts))
    with health_of_scorer(engine="vllm", model="m", noise=None) as url:
        siop = SiopConfig(siop_scorer_url=url)
        with pytest.raises((ScorerError, ScorerUnavailable), match=rf"{url}/support.*HTTP 501"):
            asyncio.run(check_scorer(siop, policy, lambda text: None, 2.0, "who ?"))


# --- with real scorers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Scorers with the policy's tokenizer, with one by words, and with none at all."""
    folder = tmp_path_factory.mktemp("scorers")
    models = {"same": save_causal_lm(folder / "same"), "words": folder / "words", "bare": folder / "bare"}
    for name in ("words", "bare"):
        tiny_causal_lm().save_pretrained(models[name])
    build_tokenizer(["who", "?"]).save_pretrained(models["words"])
    processes = {name: ScorerProcess(["--model", str(path)], folder / f"{name}.log") for name, path in models.items()}
    try:
        yield {name: process.url for name, process in processes.items() if process.wait_healthy()}
    finally:
        for process in processes.values():
            process.stop()


def test_real_scorers(parts: Parts, scorers: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    parts = {**parts, "algorithm.siop_scorer_timeout_s": "20"}
    check(parts, algorithm__siop_scorer_url=scorers["same"])
    assert "digest" not in caplog.text
    with pytest.raises(SiopConfigError, match=r"words, the policy is .*: their tokenizers differ"):
        check(parts, algorithm__siop_scorer_url=scorers["words"])
    check(parts, algorithm__siop_scorer_url=scorers["bare"])
    assert "tells no digest of its tokenizer" in caplog.text


# --- other trainers ---------------------------------------------------------------------------------------------------

REWARDS = {
    "token_level_rewards": torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
    "response_mask": torch.ones(2, 2, dtype=torch.int64),
}


def _verls_config(*overrides: str) -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["algorithm.adv_estimator=siop", *overrides])


def _by_verls_trainer(config: Any) -> torch.Tensor:
    data = DataProto(
        batch=TensorDict(dict(REWARDS), batch_size=2), non_tensor_batch={"uid": np.array(["q", "q"], dtype=object)}
    )
    estimator: Any = "siop"  # typed as verl's own estimators only
    return compute_advantage(data, adv_estimator=estimator, config=config.algorithm).batch["advantages"]


def test_verls_own_trainers_do_not_train_on_exact_match() -> None:
    message = (
        r"adv_estimator=siop is not allowed with {}: .*exact match with the gold answers. Train with python -m verl"
    )
    with pytest.raises(SiopConfigError, match=message.format("trainer.v1.trainer_mode=sync")):
        _by_verls_trainer(_verls_config())
    with pytest.raises(SiopConfigError, match=message.format("trainer.v1.trainer_mode=colocate_async")):
        _by_verls_trainer(_verls_config("trainer.v1.trainer_mode=colocate_async"))
    with pytest.raises(SiopConfigError, match=message.format("trainer.use_v1=false")):
        _by_verls_trainer(_verls_config("trainer.v1.trainer_mode=siop", "trainer.use_v1=false"))


def test_our_trainer_and_python_may_use_it(parts: Parts) -> None:
    expected = _by_verls_trainer(changed(parts))
    assert expected.tolist() != [[0.0, 0.0], [0.0, 0.0]]
    estimator = get_adv_estimator_fn("siop")
    alone = OmegaConf.to_container(changed(parts).algorithm)
    for config in (None, {}, alone, OmegaConf.create(alone), changed(parts).algorithm):
        advantages, _ = estimator(**REWARDS, index=np.array(["q", "q"]), config=config)
        assert torch.equal(advantages, expected)
    with_rest = _verls_config()
    with open_dict(with_rest):
        del with_rest["trainer"]
    estimator(**REWARDS, index=np.array(["q", "q"]), config=with_rest.algorithm)


def test_our_entry_point_refuses_another_trainer_at_once(parts: Parts) -> None:
    overrides = [f"{key}={value}" for key, value in {**parts, "trainer.v1.trainer_mode": "sync"}.items()]
    command = [sys.executable, "-m", "verl.trainer.siop.main", "hardware=cpu", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: trainer.v1.trainer_mode=sync is not allowed with algorithm.adv_estimator=siop" in done.stderr
