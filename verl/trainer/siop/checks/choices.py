"""Names that a run looks up: in verl's registries, among its packages, in files and modules of the user's."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.trainer.siop.checks.values import shown
from verl.utils.siop import cpu
from verl.utils.siop.data.chat import first_cause
from verl.utils.siop.errors import SiopConfigError

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MANAGER = f"{ROLLOUT}.agent.agent_loop_manager_class"
OUR_MANAGER = "verl.trainer.siop.rollouts.agent_loop.SiopAgentLoopManager"
SAMPLER = "trainer.v1.sampler.custom_sampler"
OUR_SAMPLER = ("pkg://verl.trainer.siop.replay_buffer", "CheckedReplayBuffer")
# The package that a logger of verl imports, where that is not one of this project's requirements.
LOGGER_PACKAGES = {name: name for name in ("wandb", "swanlab", "mlflow", "trackio", "clearml", "tensorboard")}
CONTENTS = ("model", "optimizer", "extra", "hf_model")  # verl's CheckpointManager.should_save_*


# ---------------------------------------------------------------------- what there is to choose from
def _estimators(config: DictConfig) -> Collection[str]:
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    return ADV_ESTIMATOR_REGISTRY


def _losses(config: DictConfig) -> Collection[str]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    return POLICY_LOSS_REGISTRY


def _rollouts(config: DictConfig) -> Collection[str]:
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    return {*RolloutReplicaRegistry._registry, *(["hf_cpu"] if cpu.is_active() else [])}


def _engines(config: DictConfig) -> Collection[str]:
    """Those whose packages are installed."""
    from verl.workers.engine import EngineRegistry

    return EngineRegistry._engines["language_model"]


def _trainers(config: DictConfig) -> Collection[str]:
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    return {*TRAINER_REGISTRY, "siop"}


def _kl_estimators() -> list[str]:
    """The names that verl's ``kl_penalty`` computes; it has no registry."""
    import torch
    from verl.trainer.ppo.core_algos import kl_penalty

    compute: Callable[..., Any] = kl_penalty  # typed for tensors on a GPU

    def computes(name: str) -> bool:
        try:
            compute(torch.zeros(1), torch.zeros(1), name)
        except NotImplementedError:
            return False
        return True

    plain = [name for name in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "full") if computes(name)]
    return plain + [f"{name}+" for name in plain]


def _loss_kl(config: DictConfig) -> Collection[str]:
    return _kl_estimators() if config.actor_rollout_ref.actor.use_kl_loss else ()


def _reward_kl(config: DictConfig) -> Collection[str]:
    return _kl_estimators() if config.algorithm.use_kl_in_reward else ()


def _loggers(config: DictConfig) -> Collection[str]:
    from verl.utils.tracking import Tracking

    return [*Tracking.supported_backend, "tracking"]


# Key, and the names it may have; none where the key is not read. A list is looked at name by name.
CHOICES: tuple[tuple[str, Callable[[DictConfig], Collection[str]]], ...] = (
    ("algorithm.adv_estimator", _estimators),
    ("algorithm.kl_penalty", _reward_kl),
    ("algorithm.kl_ctrl.type", lambda config: ("fixed", "adaptive")),
    (f"{ACTOR}.policy_loss.loss_mode", _losses),
    (f"{ACTOR}.kl_loss_type", _loss_kl),
    (f"{ACTOR}.strategy", _engines),
    (f"{ACTOR}.checkpoint.save_contents", lambda config: CONTENTS),
    (f"{ACTOR}.checkpoint.load_contents", lambda config: CONTENTS),
    ("actor_rollout_ref.ref.strategy", _engines),
    (f"{ROLLOUT}.name", _rollouts),
    (f"{ROLLOUT}.mode", lambda config: ("async",)),
    (f"{ROLLOUT}.multi_turn.tool_response_truncate_side", lambda config: ("left", "right", "middle")),
    ("reward.reward_manager.source", lambda config: ("register", "importlib")),
    ("trainer.logger", _loggers),
    ("trainer.resume_mode", lambda config: ("auto", "disable", "resume_path")),
    ("trainer.v1.trainer_mode", _trainers),
)


def check_choices(config: DictConfig) -> str:
    """Check every name that a run looks up, by looking it up.

    Raises:
        SiopConfigError: naming the key, the value, and the names that there are or why it cannot be had.
    """
    library = "actor_rollout_ref.model.external_lib"
    _load(library, lambda: _import_libraries(config.actor_rollout_ref.model.get("external_lib")), config)
    for key, names in CHOICES:
        value, allowed = OmegaConf.select(config, key), names(config)
        several = OmegaConf.is_list(value)
        if value is None and "strategy" in key:
            continue  # of a configuration without that section
        for name in value if several else [value]:
            if allowed and name not in allowed:
                near = difflib.get_close_matches(str(name).lower(), allowed, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise SiopConfigError(f"{key}={shown(value)} is not allowed{hint}: choose {_one_of(allowed, several)}")
    _check_loggers(config)
    _check_resumption(config)
    _check_cluster(config)
    for key, load in _loaded(config):
        _load(key, load, config)
    return "all names are known"


def _one_of(names: Collection[str], several: bool) -> str:
    if len(names) == 1:
        return next(iter(names))
    return f"{'from' if several else 'one of'} {', '.join(sorted(names))}"


def _check_loggers(config: DictConfig) -> None:
    loggers = config.trainer.logger
    for name in [loggers] if isinstance(loggers, str) else loggers:
        package = LOGGER_PACKAGES.get("wandb" if name == "tracking" else name)
        if package and importlib.util.find_spec(package) is None:
            raise SiopConfigError(
                f"trainer.logger={shown(loggers)} (TRAINER_LOGGER) is not allowed: {name} is not installed; pip "
                f"install {package}, or leave it out"
            )


def _check_resumption(config: DictConfig) -> None:
    trainer = config.trainer
    path, key = trainer.resume_from_path, f"trainer.resume_from_path={shown(trainer.resume_from_path)}"
    if trainer.resume_mode != "resume_path":
        if path:
            raise SiopConfigError(
                f"{key} has no effect with trainer.resume_mode={trainer.resume_mode}; set that to resume_path"
            )
        return
    # As verl reads the step of it.
    if not isinstance(path, str) or not re.fullmatch(r"\d+", path.split("global_step_")[-1]):
        raise SiopConfigError(
            f"{key} is not allowed with trainer.resume_mode=resume_path: needs the path of a folder global_step_N, "
            "without a slash behind it"
        )
    if not (Path(path) / "actor").is_dir():
        raise SiopConfigError(f"{key}: there is no checkpoint (no folder {Path(path) / 'actor'})")


def _check_cluster(config: DictConfig) -> None:
    nodes, address = config.trainer.nnodes, OmegaConf.select(config, "ray_kwargs.ray_init.address")
    private = address == "local" or (address is None and not os.environ.get("RAY_ADDRESS"))
    if nodes > 1 and private:
        where = "the run's own Ray has one node: start Ray on all and set RAY_ADDRESS to that of the head node"
        if config.trainer.device == "cpu":
            where += ", with hardware=cpu_cluster"
        raise SiopConfigError(f"trainer.nnodes={nodes} (NNODES) is not allowed: {where}")


# ---------------------------------------------------------------------- code of the user's
def _loaded(config: DictConfig) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The keys that name code, each with verl's own way of loading it."""
    from verl.trainer.ppo.reward import get_custom_reward_fn, resolve_reward_manager_cls
    from verl.utils.dataset.rl_dataset import get_dataset_class
    from verl.utils.import_utils import load_class_from_fqn, load_extern_object

    yield "reward.custom_reward_function", lambda: get_custom_reward_fn(config)
    # After the function, whose file may register it.
    yield "reward.reward_manager.name", lambda: resolve_reward_manager_cls(config)
    if (config.data.get("custom_cls") or {}).get("path"):
        yield "data.custom_cls", lambda: get_dataset_class(config.data)
    ours = config.trainer.v1.trainer_mode == "siop"
    for key in (MANAGER, "trainer.checkpoint_callback_class"):
        name = OmegaConf.select(config, key)
        if name:
            yield key, lambda name=name: load_class_from_fqn(name)  # type: ignore[misc]
        elif key == MANAGER and ours:
            raise SiopConfigError(
                f"{key}={shown(name)} is not allowed with trainer.v1.trainer_mode=siop: nobody would answer calls that "
                f"cannot be read, nor count any; leave it at {OUR_MANAGER}, or name a class that is one"
            )
    sampler = config.trainer.v1.sampler.get("custom_sampler") or {}
    path, name = sampler.get("path"), sampler.get("name")
    if path and name:
        yield SAMPLER, lambda: _sampler(load_extern_object(path, name), ours)
    elif ours or path:
        raise SiopConfigError(
            f"{SAMPLER}.path={shown(path)} with {SAMPLER}.name={shown(name)} is not allowed: verl's own sampler would "
            f"be used; leave them at {OUR_SAMPLER[0]} and {OUR_SAMPLER[1]}"
        )


def _sampler(named: Any, ours: bool) -> None:
    from verl.trainer.siop.replay_buffer import CheckedReplayBuffer

    if ours and not (isinstance(named, type) and issubclass(named, CheckedReplayBuffer)):
        raise TypeError(f"trainer.v1.trainer_mode=siop needs a subclass of {OUR_SAMPLER[1]}")


def _import_libraries(names: Any) -> None:
    from verl.utils.import_utils import import_external_libs

    import_external_libs(OmegaConf.to_container(names) if OmegaConf.is_config(names) else names)


def _load(key: str, load: Callable[[], Any], config: DictConfig) -> None:
    try:
        load()
    except Exception as error:  # the user's code may raise anything
        value = OmegaConf.select(config, key)
        if OmegaConf.is_dict(value):
            value = f"{key}.path={shown(value.get('path'))} {key}.name={shown(value.get('name'))}"
        else:
            value = f"{key}={shown(value)}"
        raise SiopConfigError(f"{value} cannot be loaded: {first_cause(error)}") from error
