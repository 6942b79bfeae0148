"""The siop_* keys: defaults, validation, where they are read from."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl.trainer.config import AlgoConfig
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.siop_process_reward import SiopConfig


def test_defaults() -> None:
    assert dataclasses.asdict(SiopConfig()) == {
        "siop_reward_mode": "process",
        "siop_use_gold_ref": False,
        "siop_advantage_mode": "turn_level",
        "siop_enable_two_pass": True,
        "siop_baseline": "leave_one_out",
        "siop_return": "sum",
        "siop_turn_weight": 0.3,
        "siop_boundary": "before_answer",
        "siop_gain": "peak",
        "siop_lambda": 0.5,
        "siop_vote": "count",
        "siop_eta": 1.0,
        "siop_evidence": "mean",
        "siop_num_refs": 3,
        "siop_epsilon": 1e-8,
        "siop_consensus_terminal": "frequency",
        "siop_outcome_weight": 0.0,
        "siop_strict_entailment": True,
        "siop_probe_opening": True,
        "siop_reference_prefix": "auto",
        "siop_reference_suffix": "auto",
        "siop_scorer_noise": 1e-5,
        "siop_streaming": True,
        "siop_scorer": "server",
        "siop_scorer_url": "http://127.0.0.1:8390",
        "siop_scorer_timeout_s": 600.0,
        "siop_on_scorer_error": "raise",
        "siop_on_nothing_learnt": "stop",
        "siop_import": "",
    }


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("siop_reward_mode", "empo", "process, majority_binary, cluster_frequency, query_consensus, verifiable"),
        ("siop_baseline", "loo", "leave_one_out, pooled, turn_index, turn_group"),
        ("siop_return", "max", "sum, min"),
        ("siop_turn_weight", 0, "a number above 0.0"),
        ("siop_evidence", "sum", "mean, max"),
        ("siop_vote", "majority", "count, informed"),
        ("siop_outcome_weight", -1, "a number from 0.0"),
        ("siop_consensus_terminal", "mass", "frequency, support"),
        ("siop_boundary", 1, "before_answer, assistant, observation"),
        ("siop_gain", None, "peak, prob, log"),
        ("siop_scorer", "frozen", "server, policy"),
        ("siop_on_scorer_error", "zero", "raise, drop_group"),
        ("siop_on_nothing_learnt", "ignore", "stop, warn"),
        ("siop_use_gold_ref", "true", "true or false"),
        ("siop_enable_two_pass", 1, "true or false"),
        ("siop_lambda", 1.5, "a number from 0.0 to 1.0"),
        ("siop_lambda", True, "a number from 0.0 to 1.0"),
        ("siop_lambda", "0.5", "a number from 0.0 to 1.0"),
        ("siop_eta", -0.1, "a number from 0.0"),
        ("siop_eta", float("nan"), "a number from 0.0"),
        ("siop_eta", float("inf"), "a number from 0.0"),
        ("siop_eta", 10**400, "a number from 0.0"),
        ("siop_num_refs", 0, "a whole number from 1"),
        ("siop_num_refs", 2.0, "a whole number from 1"),
        ("siop_epsilon", 0, "a number above 0.0"),
        ("siop_scorer_timeout_s", 0, "a number above 0.0"),
        ("siop_reference_prefix", None, "a text"),
        ("siop_reference_prefix", " auto", "auto, or a text"),
        ("siop_reference_suffix", "Auto", "auto, or a text"),
        ("siop_import", None, "a text"),
        ("siop_import", "no.such.module", "a module that Python can import"),
        ("siop_import", ".x", "a module that Python can import"),
        ("siop_scorer_url", "localhost:8390", "http://"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(SiopConfigError) as error:
        SiopConfig(**{key: value})
    assert key in str(error.value)
    assert repr(value) in str(error.value)
    assert allowed in str(error.value)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(SiopConfigError, match=r"siop_lamda=0\.3; did you mean siop_lambda\?.*siop_eta"):
        SiopConfig(siop_lamda=0.3)  # type: ignore[call-arg]
    with pytest.raises(SiopConfigError, match="siop_basline"):
        SiopConfig.from_algorithm({"siop_basline": "pooled"})


def test_gold_reference_excludes_the_modes_that_count_clusters() -> None:
    for mode in ("majority_binary", "cluster_frequency", "query_consensus"):
        with pytest.raises(SiopConfigError, match=f"siop_use_gold_ref=True.*{mode}"):
            SiopConfig(siop_use_gold_ref=True, siop_reward_mode=mode)


def test_turn_group_sums_for_itself() -> None:
    with pytest.raises(SiopConfigError, match=r"siop_return='min'.*siop_baseline='turn_group'"):
        SiopConfig(siop_return="min", siop_baseline="turn_group")


def test_keys_come_from_the_algorithm_section_in_every_form() -> None:
    expected = SiopConfig(siop_lambda=1.0, siop_gain="log")
    section = {"gamma": 0.9, "adv_estimator": "siop", "siop_lambda": 1, "siop_gain": "log"}
    assert SiopConfig.from_algorithm(section) == expected
    assert SiopConfig.from_algorithm(OmegaConf.create(section)) == expected
    assert isinstance(SiopConfig.from_algorithm(section).siop_lambda, float)
    nothing: list[Any] = [None, {}, OmegaConf.create({}), AlgoConfig()]
    for empty in nothing:
        assert SiopConfig.from_algorithm(empty) == SiopConfig()


def test_it_is_frozen_and_travels() -> None:
    config = SiopConfig(siop_eta=0.25)
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, siop_eta=0.5).siop_eta == 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.siop_eta = 1.0  # type: ignore[misc]
    with pytest.raises(SiopConfigError):
        dataclasses.replace(config, siop_eta=-1.0)


@pytest.mark.parametrize(
    ("key", "variable"), [("siop_nli_model", "SIOP_NLI_MODEL"), ("siop_nli_device", "SIOP_NLI_DEVICE")]
)
def test_a_key_of_the_release_that_the_scorer_has_is_named(key: str, variable: str) -> None:
    with pytest.raises(SiopConfigError, match=rf"unknown key {key}='x': .*start it with {variable}"):
        SiopConfig.from_algorithm({key: "x"})
