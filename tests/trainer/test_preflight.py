"""Bad input: one message that names it, before Ray starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from preflight_world import ROW, Parts, check, config_of, health_of_scorer, right_parts, write_rows
from verl.trainer.siop.main import main, record_config
from verl.trainer.siop.preflight import DataError, check_before_start, check_method, check_overrides
from verl.utils.siop.errors import ScorerUnavailable, SiopConfigError
from verl.utils.siop.siop_process_reward import SiopConfig

from examples.toy_world.tokenizer import REFERENCE_PREFIX, REFERENCE_SUFFIX

ROOT = Path(__file__).parents[2]
CLIP = ["actor_rollout_ref.actor.policy_loss.loss_mode=turn_clip", "algorithm.siop_baseline=turn_group"]


@pytest.fixture
def parts(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Overrides of a run in which everything is right but that there is no scorer."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    return right_parts(tmp_path, tiny_model)


def _parquet(tmp_path: Path, row: dict[str, Any]) -> str:
    return write_rows(tmp_path / "bad.parquet", [row])


def test_yaml_and_config_class_have_the_same_defaults() -> None:
    assert SiopConfig.from_algorithm(config_of().algorithm) == SiopConfig()


OTHER_VALUES: dict[str, Any] = {
    "siop_reward_mode": "query_consensus",
    "siop_use_gold_ref": True,
    "siop_advantage_mode": "broadcast",
    "siop_enable_two_pass": False,
    "siop_baseline": "turn_group",
    "siop_return": "min",
    "siop_turn_weight": 1.5,
    "siop_boundary": "observation",
    "siop_gain": "log",
    "siop_lambda": 0.3,
    "siop_vote": "informed",
    "siop_eta": 0.0,
    "siop_evidence": "max",
    "siop_num_refs": 2,
    "siop_epsilon": 1e-6,
    "siop_consensus_terminal": "support",
    "siop_outcome_weight": 0.5,
    "siop_strict_entailment": False,
    "siop_probe_opening": False,
    "siop_reference_prefix": "\nNow:\n",
    "siop_reference_suffix": "<|im_end|>",
    "siop_scorer_noise": 1e-3,
    "siop_streaming": False,
    "siop_scorer": "policy",
    "siop_scorer_url": "https://elsewhere:1",
    "siop_scorer_timeout_s": 5.0,
    "siop_on_scorer_error": "drop_group",
    "siop_on_nothing_learnt": "warn",
    "siop_import": "json",
}


def test_every_key_is_an_override_without_plus_and_is_recorded(tmp_path: Path) -> None:
    assert set(OTHER_VALUES) == set(SiopConfig.__dataclass_fields__)
    # Not allowed with the other values of siop_reward_mode, siop_return, siop_boundary.
    apart = {"siop_use_gold_ref", "siop_baseline", "siop_probe_opening"}
    parts = ["data.train_files=t", "data.val_files=v", "actor_rollout_ref.model.path=m"]
    for keys in (apart, set(OTHER_VALUES) - apart):
        values = {key: OTHER_VALUES[key] for key in keys}
        texts = {key: f'"{value}"' if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        folder = tmp_path / str(len(keys))
        overrides = [f"algorithm.{key}={text}" for key, text in texts.items()]
        config = config_of(*overrides, f"trainer.default_local_dir={folder}", *parts)
        record_config(config)
        recorded = OmegaConf.load(folder / "config.yaml").algorithm
        for algorithm in (config.algorithm, recorded):
            assert SiopConfig.from_algorithm(algorithm) == SiopConfig(**values)
            assert all(algorithm[key] == value != getattr(SiopConfig(), key) for key, value in values.items())


def test_an_evaluation_records_no_configuration(tmp_path: Path) -> None:
    record_config(config_of("trainer.val_only=true", f"trainer.default_local_dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("siop", {}),
        ("informed", {"siop_vote": "informed"}),
        ("policy", {"siop_scorer": "policy"}),
        (
            "release",
            {
                "siop_baseline": "pooled",
                "siop_boundary": "assistant",
                "siop_gain": "log",
                "siop_probe_opening": False,
                "siop_reference_prefix": "\nNow there's enough information to answer\n</think>\n<answer>\n",
                "siop_reference_suffix": "\n</answer><|im_end|>",
            },
        ),
        ("empo", {"siop_reward_mode": "cluster_frequency", "siop_advantage_mode": "broadcast"}),
        ("ttrl", {"siop_reward_mode": "majority_binary", "siop_advantage_mode": "broadcast"}),
        ("grpo", {}),
        ("igpo", {"siop_use_gold_ref": True, "siop_gain": "prob", "siop_boundary": "observation"}),
        (
            "query_consensus",
            {"siop_reward_mode": "query_consensus", "siop_consensus_terminal": "support", "siop_gain": "prob"},
        ),
        ("query_frequency", {"siop_reward_mode": "query_consensus"}),
        ("matchtir", {"siop_baseline": "turn_index"}),
        ("vpr", {"siop_reward_mode": "verifiable", "siop_baseline": "turn_index"}),
        ("vpr_loo", {"siop_reward_mode": "verifiable"}),
        ("vpr_return", {"siop_reward_mode": "verifiable"}),
        ("pure", {"siop_return": "min", "siop_gain": "prob"}),
        ("a2tgpo", {"siop_baseline": "turn_group"}),
        (
            "trace",
            {
                "siop_use_gold_ref": True,
                "siop_gain": "gap",
                "siop_boundary": "observation",
                "siop_baseline": "trace",
                "siop_turn_weight": 0.2,
            },
        ),
    ],
)
def test_ablation_presets(name: str, changes: dict[str, Any]) -> None:
    overrides = [f"hydra.searchpath=[pkg://verl.trainer.config,file://{ROOT / 'config'}]", f"ablation={name}"]
    config = config_of(*overrides)
    assert SiopConfig.from_algorithm(config.algorithm) == SiopConfig(**changes)
    check_method(config, SiopConfig(**changes))
    assert config.algorithm.adv_estimator == ("grpo" if name == "grpo" else "siop")
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == ("turn_clip" if name == "a2tgpo" else "vanilla")


@pytest.mark.parametrize("group", ["ablation", "experiment"])
def test_a_preset_that_does_not_exist_is_refused_with_those_that_do(group: str) -> None:
    searchpath = f"hydra.searchpath=[pkg://verl.trainer.config,file://{ROOT / 'config'}]"
    with pytest.raises(MissingConfigException, match=r"relase[\s\S]*(release|toy)"):
        config_of(searchpath, f"{group}=relase")


def test_a_misspelt_key_gets_our_message_not_hydras(monkeypatch: pytest.MonkeyPatch) -> None:
    for override in ("algorithm.siop_lamda=0.3", "+algorithm.siop_lamda=0.3", "~algorithm.siop_lamda"):
        monkeypatch.setattr(sys, "argv", ["main", "trainer.nnodes=1", override])
        with pytest.raises(SystemExit, match=r"error: unknown key siop_lamda=.*did you mean siop_lambda.*siop_eta"):
            main()
    check_overrides(["algorithm.siop_lambda=0.3", "algorithm.gamma=1", "~algorithm.siop_eta"])


def test_workers_get_their_environment_and_ray_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RETRIEVER_URL", "http://10.0.0.7:8000/retrieve")
    parts = [
        "data.train_files=t",
        "data.val_files=v",
        "actor_rollout_ref.model.path=m",
        "trainer.default_local_dir=out",
    ]
    ray_init = config_of("hardware=gpu", *parts).ray_kwargs.ray_init
    assert ray_init.address == "local"
    assert ray_init.runtime_env.env_vars.RETRIEVER_URL == "http://10.0.0.7:8000/retrieve"
    assert ray_init.runtime_env.env_vars.TENSORBOARD_DIR == "out/tensorboard"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert config_of("hardware=gpu", *parts).ray_kwargs.ray_init.address == "10.0.0.1:6379"
    assert config_of(*parts).ray_kwargs.ray_init.address == "local"  # on CPU


def test_one_rollout_of_a_question_is_warned_about(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ScorerUnavailable):
        check(parts, actor_rollout_ref__rollout__n="1")
    assert "rollout.n=1" in caplog.text


def test_the_toy_experiment_and_a_preset() -> None:
    overrides = [f"hydra.searchpath=[pkg://verl.trainer.config,file://{ROOT / 'config'}]", "ablation=release"]
    toy = config_of(*overrides, "experiment=toy")
    assert toy.algorithm.siop_baseline == "pooled"
    assert toy.trainer.total_training_steps == 60 and toy.actor_rollout_ref.rollout.n == 8
    assert toy.algorithm.siop_reference_prefix == REFERENCE_PREFIX
    assert toy.algorithm.siop_reference_suffix == REFERENCE_SUFFIX


def test_a_correct_setup_passes_up_to_the_scorer(parts: Parts) -> None:
    check(parts, algorithm__adv_estimator="grpo")
    check(parts, trainer__val_only="true", trainer__val_before_train="true")
    with pytest.raises(ScorerUnavailable, match=parts["algorithm.siop_scorer_url"]):
        check(parts)


def test_a_scorer_without_a_language_model_is_enough_for_the_policy_alone(
    parts: Parts,
) -> None:
    with health_of_scorer(engine="none", model="none") as url:
        check(parts, algorithm__siop_scorer="policy", algorithm__siop_scorer_url=url)
        with pytest.raises(SiopConfigError, match=r"siop_scorer=server, but the scorer at http.* has no language mod"):
            check(parts, algorithm__siop_scorer_url=url)


def test_support_from_the_policy_needs_a_scorer_only_for_clusters(parts: Parts) -> None:
    check(parts, algorithm__siop_scorer="policy", algorithm__siop_use_gold_ref="true")
    with pytest.raises(ScorerUnavailable):
        check(parts, algorithm__siop_scorer="policy")


def test_support_from_the_policy_cannot_replay_routes(parts: Parts) -> None:
    changes = [
        "algorithm.siop_scorer=policy",
        "+actor_rollout_ref.actor.megatron.router_replay.mode=R3",
    ]
    with pytest.raises(SiopConfigError, match=r"actor.megatron.router_replay.mode=R3 is not allowed .*siop_scorer=pol"):
        check_before_start(config_of(*(f"{key}={value}" for key, value in parts.items()), *changes))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.rollout_correction.rollout_rs=token_k1", r"rollout_rs=token_k1 is not allowed"),
        ("algorithm.siop_gain=linear", r"siop_gain='linear'.*peak, prob, log"),
        ("algorithm.siop_lambda=2", r"siop_lambda=2.*0.* to 1"),
        ("+algorithm.siop_lamda=0.3", r"siop_lamda=0.3; did you mean siop_lambda"),
    ],
)
def test_wrong_keys_and_values_are_named(parts: Parts, override: str, message: str) -> None:
    overrides = [f"{key}={value}" for key, value in parts.items()]
    with pytest.raises(SiopConfigError, match=message):
        check_before_start(config_of(*overrides, override))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.v1.trainer_mode=sync"], r"trainer_mode=sync is not allowed .*adv_estimator=siop.*set it to siop"),
        (["algorithm.siop_return=min", "algorithm.gamma=0.9"], r"algorithm.gamma=0.9 .*algorithm.siop_return=min"),
        (
            ["algorithm.siop_reward_mode=query_consensus", "actor_rollout_ref.rollout.multi_turn.format=gpt-oss"],
            r"multi_turn.format=gpt-oss .*siop_reward_mode=query_consensus.*hermes",
        ),
        (
            ["actor_rollout_ref.actor.policy_loss.loss_mode=turn_clip"],
            r"siop_baseline=leave_one_out .*set it to turn_gr",
        ),
        ([*CLIP, "algorithm.gamma=0.9"], r"algorithm.gamma=0.9 .*turn_clip.*set it to 1.0"),
        ([*CLIP, "algorithm.siop_turn_weight=1.0"], r"algorithm.siop_turn_weight=1.0 .*set it to 0.3"),
        ([*CLIP, "algorithm.siop_advantage_mode=broadcast"], r"siop_advantage_mode=broadcast .*set it to turn_level"),
    ],
)
def test_keys_that_do_not_fit_keys_of_verl(overrides: list[str], message: str) -> None:
    config = config_of(*overrides)
    with pytest.raises(SiopConfigError, match=message):
        check_method(config, SiopConfig.from_algorithm(config.algorithm))
    config.algorithm.adv_estimator = "grpo"  # which uses none of them
    check_method(config, SiopConfig.from_algorithm(config.algorithm))


@pytest.mark.parametrize("column", ["prompt", "data_source", "reward_model"])
def test_missing_column(parts: Parts, tmp_path: Path, column: str) -> None:
    path = _parquet(tmp_path, {key: value for key, value in ROW.items() if key != column})
    with pytest.raises(DataError, match=rf"data.val_files={path}: column '{column}' is missing"):
        check(parts, data__val_files=path)


def test_malformed_columns_and_files(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'prompt' has type string"):
        check(parts, data__train_files=_parquet(tmp_path, {**ROW, "prompt": "who?"}))
    with pytest.raises(DataError, match="'reward_model' has no field 'ground_truth'"):
        check(parts, data__train_files=_parquet(tmp_path, {**ROW, "reward_model": {"style": "rule"}}))
    with pytest.raises(DataError, match="row 0: 'prompt' must be a list of messages with role and content"):
        check(parts, data__train_files=_parquet(tmp_path, {**ROW, "prompt": [{"role": "user", "text": "who?"}]}))
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"data.train_files=.*text.parquet: not a parquet file"):
        check(parts, data__train_files=str(tmp_path / "text.parquet"))
    with pytest.raises(DataError, match=r"data.train_files=nowhere.parquet: no such file"):
        check(parts, data__train_files="nowhere.parquet")
    with pytest.raises(SiopConfigError, match=r"tool_config_path=nowhere.yaml: no such file"):
        check(parts, actor_rollout_ref__rollout__multi_turn__tool_config_path="nowhere.yaml")


def test_too_long_a_prompt_names_row_and_lengths(parts: Parts, tmp_path: Path) -> None:
    long = {**ROW, "prompt": [{"role": "user", "content": "long " * 40}]}
    path = write_rows(tmp_path / "long.parquet", [long, ROW, ROW])
    with pytest.raises(DataError, match=rf"{path}: row 0: the prompt has 2\d\d tokens, data.max_prompt_length is 64"):
        check(parts, data__train_files=path)
    check(parts, data__train_files=path, data__filter_overlong_prompts="true", algorithm__adv_estimator="grpo")


def test_model_without_chat_template(parts: Parts, tmp_path: Path, tiny_model: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(SiopConfigError, match=rf"model.path={bare}: the tokenizer has no chat template"):
        check(parts, actor_rollout_ref__model__path=str(bare))
    shutil.copytree(tiny_model, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "model.safetensors").rename(tmp_path / "tokenizer" / "optimizer.pt")
    with pytest.raises(SiopConfigError, match=r"tokenizer: the folder holds no weights \(\*.safetensors or \*.bin\)"):
        check(parts, actor_rollout_ref__model__path=str(tmp_path / "tokenizer"))
    with pytest.raises(SiopConfigError, match="no tokenizer can be loaded"):
        check(parts, actor_rollout_ref__model__path=str(tmp_path / "nowhere"))


def test_cpu_settings_and_platform_go_together(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERL_PLATFORM")
    with pytest.raises(SiopConfigError, match=r"trainer.device=cpu but VERL_PLATFORM=''"):
        check(parts)


def test_the_command_prints_one_line_and_fails(parts: Parts) -> None:
    overrides = [f"{key}={value}" for key, value in parts.items()]
    command = [sys.executable, "-m", "verl.trainer.siop.main", "hardware=cpu", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: no answer from the scorer at http://127.0.0.1:")
    assert "Traceback" not in done.stderr
