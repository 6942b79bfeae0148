"""Types, ranges and names of values: one line that names the key before anybody calculates with the value."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from preflight_world import MULTI_TURN, config_of
from verl.trainer.siop.checks.choices import CHOICES, check_choices
from verl.trainer.siop.checks.values import LEAST, check_dataclasses, check_values, flat
from verl.trainer.siop.preflight import forget_empty_variables
from verl.utils.siop.errors import SiopConfigError

ROOT = Path(__file__).parents[2]
SEARCH = f"hydra.searchpath=[pkg://verl.trainer.config,file://{ROOT / 'config'}]"
ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
NAMED = ["actor_rollout_ref.model.path=m", "data.train_files=t", "data.val_files=v"]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def _checked(*overrides: str) -> list[str]:
    """The warnings of all checks of values and names."""
    config, warnings = config_of(*NAMED, *overrides), list[str]()
    check_values(config, warnings.append)
    check_dataclasses(config)
    check_choices(config)
    return warnings


GAMES = [f"experiment={path.stem}" for path in sorted((ROOT / "config" / "experiment").glob("games*.yaml"))]
PRESETS = [f"ablation={path.stem}" for path in sorted((ROOT / "config" / "ablation").glob("*.yaml"))]


@pytest.mark.parametrize("preset", ["hardware=gpu", "experiment=toy", "experiment=toy_chains", *GAMES, *PRESETS])
def test_what_we_ship_passes(preset: str) -> None:
    assert _checked(SEARCH, preset) == []


# --- types and ranges -------------------------------------------------------------------------------------------------

WRONG = [
    ("data.train_batch_size=abc", "needs a whole number"),
    ("data.train_batch_size=8.5", "needs a whole number"),
    ("data.train_batch_size=0", "needs a whole number from 1"),
    ("data.train_batch_size=-1", "needs a whole number from 1"),
    ("data.train_max_samples=abc", "needs a whole number"),
    ("data.max_prompt_length=abc", "needs a whole number"),
    ("data.max_prompt_length=null", "needs a whole number"),
    ("data.max_response_length=0", "needs a whole number from 1"),
    ("data.shuffle=maybe", "needs true or false"),
    ("data.prompt_key=null", "needs a text"),
    ("trainer.default_local_dir=null", "needs a text"),
    ("trainer.total_epochs=abc", "needs a whole number"),
    ("trainer.total_epochs=0", "needs a whole number from 1"),
    ("trainer.save_freq=abc", "needs a whole number"),
    ("trainer.nnodes=abc", "needs a whole number"),
    ("trainer.max_actor_ckpt_to_keep=two", "needs a whole number or null"),
    ("algorithm.gamma=abc", "needs a number"),
    ("algorithm.gamma=nan", "needs a number"),
    ("algorithm.gamma=inf", "needs a number from 0"),
    (f"{ROLLOUT}.n=abc", "needs a whole number"),
    (f"{ROLLOUT}.n=2.5", "needs a whole number"),
    (f"{ROLLOUT}.n=null", "needs a whole number"),
    (f"{ROLLOUT}.n=0", "needs a whole number from 1"),
    (f"{ROLLOUT}.temperature=hot", "needs a number"),
    (f"{ROLLOUT}.val_kwargs.n=abc", "needs a whole number"),
    (f"{ROLLOUT}.val_kwargs.n=0", "needs a whole number from 1"),
    (f"{MULTI_TURN}.max_parallel_calls=0", "needs a whole number from 1"),
    (f"{MULTI_TURN}.max_assistant_turns=0", "needs a whole number from 1"),
    (f"{ACTOR}.optim.lr=abc", "needs a number"),
    (f"{ACTOR}.use_kl_loss=perhaps", "needs true or false"),
    # --- by verl's own dataclasses
    (f"{ACTOR}.loss_agg_mode=typo", "Invalid loss_agg_mode"),
    (f"{ACTOR}.optim.lr_scheduler_type=typo", "constant"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "allowed"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(override: str, allowed: str) -> None:
    with pytest.raises(SiopConfigError, match=rf"^{re.escape(override)} is not allowed: .*{allowed}") as error:
        _checked(override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "data.train_max_samples=-1",
        "data.seed=null",
        "data.val_batch_size=7",
        "trainer.total_training_steps=3",
        "trainer.max_actor_ckpt_to_keep=null",
        "trainer.val_before_train=1",
        "trainer.v1.sampler.max_off_policy_threshold=null",
        "trainer.v1.colocate_async.num_warmup_batches=1.5",
        "algorithm.gamma=1",
        f"{ROLLOUT}.top_p=1",
        f"{ROLLOUT}.max_model_len=null",
        f"{MULTI_TURN}.max_assistant_turns=null",
        f"{ACTOR}.optim.lr=1e-6",
        f"{ACTOR}.optim.lr=0",
        "trainer.logger=console",
        "data.train_files=[a,b]",
        "+actor_rollout_ref.model.override_config.attention_dropout=0.1",
        # read by verl, though no default names it
        "+trainer.wandb_proxy=http://proxy",
        f"+{ROLLOUT}.repetition_penalty=1.1",
    ],
)
def test_a_right_value_passes(override: str) -> None:
    assert _checked(override) == []


def test_least_values_are_of_keys_that_there_are() -> None:
    config = config_of(*NAMED)
    missing = object()
    for key in (*LEAST, *(key for key, _ in CHOICES)):
        assert OmegaConf.select(config, key, default=missing) is not missing, key


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("+trainer.totl_epochs=3", "trainer.total_epochs"),
        ("+data.shufle=true", "data.shuffle"),
        (f"+{ROLLOUT}.max_num_seq=3", f"{ROLLOUT}.max_num_seqs"),
        (f"+{MULTI_TURN}.max_assistent_turns=3", f"{MULTI_TURN}.max_assistant_turns"),
    ],
)
def test_a_misspelt_key_that_hydra_adds_is_refused(override: str, meant: str) -> None:
    with pytest.raises(SiopConfigError, match=rf"^unknown key {re.escape(override[1:])}; did you mean {meant}\?$"):
        _checked(override)


def test_a_key_that_only_code_of_the_users_can_read_is_warned_about() -> None:
    (warning,) = _checked("+data.my_own_option=3")
    assert warning.startswith("data.my_own_option=3 has no effect unless code of your own reads it")


def test_verls_files_of_defaults_are_its_defaults() -> None:
    """The types of keys that are in no dataclass come from there."""
    from verl.trainer.siop.checks.values import _files

    known = set().union(*_files())
    composed = {key for key, _ in flat(OmegaConf.to_container(config_of(*NAMED)))}
    assert composed - known <= {"model_engine"}


# --- names ------------------------------------------------------------------------------------------------------------

UNKNOWN = [
    (["algorithm.adv_estimator=SIOP"], r"did you mean siop\?.*choose one of gae, .*grpo"),
    (["algorithm.adv_estimator=sipo"], r"did you mean siop\?"),
    (["algorithm.adv_estimator=grpoo"], r"did you mean grpo\?"),
    (["algorithm.adv_estimator=null"], "choose one of"),
    (["algorithm.kl_penalty=typo", "algorithm.use_kl_in_reward=true"], "low_var_kl"),
    (["algorithm.kl_ctrl.type=typo"], "adaptive, fixed"),
    ([f"{ACTOR}.policy_loss.loss_mode=vanila"], r"did you mean vanilla\?.*turn_clip"),
    ([f"{ACTOR}.kl_loss_type=typo", f"{ACTOR}.use_kl_loss=true"], r"k3\+"),
    ([f"{ACTOR}.strategy=typo"], "fsdp2"),
    ([f"{ACTOR}.checkpoint.save_contents=[model,typo]"], "choose from extra, hf_model, model, optimizer"),
    ([f"{ROLLOUT}.name=typo"], "hf_cpu.*vllm"),
    ([f"{MULTI_TURN}.tool_response_truncate_side=rihgt"], r"did you mean right\?"),
    (["trainer.resume_mode=typo"], "auto, disable, resume_path"),
    (["trainer.logger=[consol]"], r"did you mean console\?"),
    (["trainer.logger=[console,swanlab]"], "swanlab is not installed; pip install swanlab"),
    (["trainer.v1.trainer_mode=typo"], "siop, sync"),
    (["trainer.nnodes=2"], "start Ray on all and set RAY_ADDRESS .* hardware=cpu_cluster"),
    (["trainer.nnodes=2", "trainer.device=cuda"], "start Ray on all and set RAY_ADDRESS"),
    (["trainer.resume_from_path=x/global_step_1"], "set that to resume_path"),
    (["trainer.resume_from_path=null", "trainer.resume_mode=resume_path"], "needs the path of a folder global_step_N"),
    (["trainer.resume_from_path=x/global_step_1/", "trainer.resume_mode=resume_path"], "without a slash behind"),
    (["trainer.resume_from_path=x/global_step_1", "trainer.resume_mode=resume_path"], "there is no checkpoint"),
    ([f"{ROLLOUT}.agent.agent_loop_manager_class=typo.X"], "cannot be loaded: .*No module named 'typo'"),
    ([f"{ROLLOUT}.agent.agent_loop_manager_class=verl.trainer.siop.X"], "cannot be loaded: AttributeError"),
    ([f"{ROLLOUT}.agent.agent_loop_manager_class=null"], "nobody would answer calls that cannot be read"),
    (["trainer.v1.sampler.custom_sampler.path=null"], "leave them at pkg://verl.trainer.siop.replay_buffer"),
    (["trainer.v1.sampler.custom_sampler.path=pkg://json", "trainer.v1.sampler.custom_sampler.name=loads"],
     "needs a subclass of CheckedReplayBuffer"),
    (["trainer.checkpoint_callback_class=typo.X"], "cannot be loaded"),
    (["reward.custom_reward_function.path=/no/file.py"], "cannot be loaded: FileNotFoundError"),
    (["reward.custom_reward_function.name=nope"], "cannot be loaded: AttributeError"),
    (["reward.reward_manager.name=typo"], "cannot be loaded"),
    (["data.custom_cls.path=/no/such.py"], "cannot be loaded: FileNotFoundError"),
    (["actor_rollout_ref.model.external_lib=no_such_library"], "cannot be loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), UNKNOWN, ids=[row[0][0] for row in UNKNOWN])
def test_a_name_that_does_not_exist_is_refused_with_those_that_do(overrides: list[str], message: str) -> None:
    key = overrides[0].partition("=")[0]
    with pytest.raises(SiopConfigError, match=rf"{re.escape(key)}[=. ].*{message}") as error:
        _checked(*overrides)
    assert "\n" not in str(error.value)


def test_names_that_exist_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def score(**kwargs): return 0.0\n")
    _checked(f"reward.custom_reward_function.path={tmp_path}/mine.py", "reward.custom_reward_function.name=score")
    (tmp_path / "global_step_3" / "actor").mkdir(parents=True)
    _checked("trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}/global_step_3")
    _checked(f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_type=k3+")
    # verl's own trainer and sampler, without ours
    nothing = [f"trainer.v1.sampler.custom_sampler.{name}=null" for name in ("path", "name")]
    manager = f"{ROLLOUT}.agent.agent_loop_manager_class=null"
    _checked("trainer.v1.trainer_mode=sync", "algorithm.adv_estimator=grpo", manager, *nothing)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    _checked("hardware=gpu", "trainer.nnodes=2", f"{ROLLOUT}.name=vllm")
    _checked("hardware=cpu_cluster", "trainer.nnodes=2")


def test_a_name_that_a_module_of_the_users_registers_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses.py").write_text(
        "from verl.trainer.ppo.core_algos import register_policy_loss\n"
        "@register_policy_loss('own_loss')\ndef loss(*args, **kwargs): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SiopConfigError, match="own_loss is not allowed"):
        _checked(f"{ACTOR}.policy_loss.loss_mode=own_loss")
    _checked(f"{ACTOR}.policy_loss.loss_mode=own_loss", "actor_rollout_ref.model.external_lib=own_losses")


# --- the environment, and the command ---------------------------------------------------------------------------------


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIOP_SCORER_URL", "RAY_ADDRESS", "RETRIEVER_URL", "MAX_TOOL_RESPONSE_LENGTH"):
        monkeypatch.setenv(name, "")
    forget_empty_variables()
    config: Any = config_of(*NAMED, "hardware=gpu")
    assert config.algorithm.siop_scorer_url == "http://127.0.0.1:8390" and config.ray_kwargs.ray_init.address == "local"
    assert "MAX_TOOL_RESPONSE_LENGTH" not in os.environ
    monkeypatch.setenv("SIOP_SCORER_URL", "http://there:1")
    forget_empty_variables()
    assert config_of(*NAMED).algorithm.siop_scorer_url == "http://there:1"


def test_the_command_names_a_wrong_type_before_it_calculates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "verl.trainer.siop.main", "hardware=cpu", *NAMED, "trainer.nnodes=abc"]
    done = subprocess.run(
        [*command, f"trainer.default_local_dir={tmp_path}/out"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "error: trainer.nnodes=abc is not allowed: needs a whole number"
    assert not (tmp_path / "out").exists()
