"""The values of all keys by type and range, and keys that nobody reads. Hydra takes both as they come.

What a key must hold is what verl says itself: the type in its dataclass, else that of its default.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import verl
from hydra.errors import InstantiationException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.utils.siop.errors import SiopConfigError

# Not looked at: free dictionaries, and keys that have checks of their own.
SKIPPED = re.compile(r"ray_kwargs\.|algorithm\.siop_|actor_rollout_ref\.model\.override_config\.|.*sampler_kwargs\.")
# verl takes null for no limit, and fractions of a batch, where the default is a whole number.
NULLABLE = {"trainer.v1.sampler.max_off_policy_threshold", "data.filter_overlong_prompts_workers"}
FRACTIONS = re.compile(r"trainer\.v1\.\w+\.num_warmup_batches")
FILES = {"data.train_files", "data.val_files"}  # a text or a list of them

ROLLOUT = "actor_rollout_ref.rollout"
MULTI_TURN = f"{ROLLOUT}.multi_turn"
# Least values of numbers. Below them a run does nothing, or fails later.
LEAST: dict[str, float] = {
    "data.train_batch_size": 1,
    "data.gen_batch_size": 1,
    "data.val_batch_size": 1,
    "data.max_prompt_length": 1,
    "data.max_response_length": 1,
    "data.dataloader_num_workers": 0,
    "data.filter_overlong_prompts_workers": 1,
    "trainer.total_epochs": 1,
    "trainer.total_training_steps": 1,
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 1,
    "algorithm.gamma": 0,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 1,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 1,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 1,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.optim.lr": 0,
    f"{ROLLOUT}.n": 1,
    f"{ROLLOUT}.val_kwargs.n": 1,
    f"{ROLLOUT}.val_kwargs.temperature": 0,
    f"{ROLLOUT}.prompt_length": 1,
    f"{ROLLOUT}.response_length": 1,
    f"{ROLLOUT}.tensor_model_parallel_size": 1,
    f"{ROLLOUT}.max_num_seqs": 1,
    f"{ROLLOUT}.max_model_len": 1,
    f"{ROLLOUT}.agent.num_workers": 1,
    f"{MULTI_TURN}.max_assistant_turns": 1,
    f"{MULTI_TURN}.max_user_turns": 1,
    f"{MULTI_TURN}.max_parallel_calls": 1,
    f"{MULTI_TURN}.max_tool_response_length": 1,
    "reward.num_workers": 1,
}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Wanted:
    """What a key must hold: one of the keys of :data:`KINDS`, and whether null is allowed too."""

    kind: type
    null: bool

    def holds(self, value: Any) -> bool:
        if value is None:
            return self.null or self.kind is bool
        if self.kind is str:
            return not OmegaConf.is_config(value)
        if self.kind is bool:
            return isinstance(value, bool) or value in (0, 1)
        number = numbers.Integral if self.kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool) and value == value


# ---------------------------------------------------------------------- what verl wants
@functools.cache
def _files() -> tuple[dict[str, Any], ...]:
    """All default keys with their values: of verl's configurations, which it ships in one piece each, then of ours."""
    verls, ours = map(importlib.resources.files, ("verl.trainer.config", "verl.trainer.siop.config"))
    paths = sorted(str(file) for file in verls.iterdir() if file.name.startswith("_generated_ppo_"))
    paths += [str(ours / "siop_trainer.yaml"), *(str(ours / "hardware" / f"{name}.yaml") for name in ("cpu", "gpu"))]
    return tuple(dict(flat(OmegaConf.to_container(OmegaConf.load(path)))) for path in paths)


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its path; a section has the value ``...``."""
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        yield name, ... if isinstance(value, dict) else value
        if isinstance(value, dict):
            yield from flat(value, name)


@functools.cache
def _of_class(target: str) -> dict[str, Any]:
    """The types of the fields of a dataclass of verl; empty if there is none of that name."""
    try:
        named = get_class(target) if target else None
        return typing.get_type_hints(named) if is_dataclass(named) else {}
    except Exception:  # noqa: BLE001  (what a module raises that is not for this machine)
        return {}


def _by_hint(hint: Any) -> Wanted | None:
    parts = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
    kinds = parts - {type(None)}
    if len(kinds) != 1 or not kinds <= {bool, int, float}:
        return None
    return Wanted(kinds.pop(), len(parts) > 1)


def _by_default(key: str) -> Wanted | None:
    values = [file[key] for file in _files() if key in file]
    known = [value for value in values if isinstance(value, tuple(KINDS)) and not str(value).startswith(("${", "???"))]
    if not known or key in FILES:
        return None
    kind = float if any(isinstance(value, float) for value in known) else type(known[0])
    return Wanted(float if FRACTIONS.fullmatch(key) else kind, None in values or key in NULLABLE)


def critic_defaults(target: str) -> dict[str, Any]:
    """verl's defaults of the critic of this class, by key, as they are written; none if verl ships no such critic."""
    found = next((file for file in _files() if file.get("critic._target_") == target), {})
    return {key: value for key, value in found.items() if key.startswith("critic.") and value is not ...}


# ---------------------------------------------------------------------- the checks
def check_values(config: DictConfig, warn: Callable[[str], None] = lambda text: None) -> str:
    """Check the type and the range of every value, and that no key is a misspelt one.

    Args:
        config: the whole configuration.
        warn: gets keys that are read nowhere in verl.

    Raises:
        SiopConfigError: naming the key, its value and what is allowed, or the key that was meant.
    """
    count = 0
    for key, name, section in _keys(config):
        # What an interpolation takes over is looked at where it comes from.
        if SKIPPED.match(key) or OmegaConf.is_missing(section, name) or OmegaConf.is_interpolation(section, name):
            continue
        count += 1
        fields = _of_class(str(section.get("_target_", "")))
        _check_name(key, name, fields, section[name], warn)
        wanted = _by_hint(fields[name]) if name in fields else _by_default(key)
        value = section[name]
        if wanted and not wanted.holds(value):
            or_null = " or null" if wanted.null and wanted.kind is not bool else ""
            raise SiopConfigError(f"{key}={shown(value)} is not allowed: needs {KINDS[wanted.kind]}{or_null}")
        least = LEAST.get(key)
        if least is not None and isinstance(value, int | float) and not least <= value < math.inf:
            kind = KINDS[wanted.kind] if wanted else "a number"
            raise SiopConfigError(f"{key}={shown(value)} is not allowed: needs {kind} from {least:g}")
    return f"{count} keys have values of their type"


def _keys(node: DictConfig, path: str = "") -> Iterator[tuple[str, str, DictConfig]]:
    """Every key that has a value: with its path, by its name, and the section it stands in."""
    for name in map(str, node):
        key = f"{path}.{name}" if path else name
        written = not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name)
        inner = node[name] if written else None
        if isinstance(inner, DictConfig):
            yield from _keys(inner, key)
        else:
            yield key, name, node


def _check_name(key: str, name: str, fields: dict[str, Any], value: Any, warn: Callable[[str], None]) -> None:
    parent = key.rpartition(".")[0]
    beside = _siblings(parent)
    if name in beside or name in fields or not beside or _is_read(name):
        return
    near = difflib.get_close_matches(name, [*beside, *fields], n=1, cutoff=0.8)
    if near:
        raise SiopConfigError(f"unknown key {key}={shown(value)}; did you mean {parent}.{near[0]}?")
    warn(f"{key}={shown(value)} has no effect unless code of your own reads it: verl does not")


@functools.cache
def _siblings(parent: str) -> frozenset[str]:
    """The names of verl's and our keys in a section."""
    return frozenset(
        key.rpartition(".")[2] for file in _files() for key in file if parent and key.rpartition(".")[0] == parent
    )


@functools.cache
def _is_read(name: str) -> bool:
    """Whether the word stands anywhere in verl's sources or ours: some keys that verl reads are in no default."""
    word = re.compile(rf"\b{re.escape(name)}\b")
    files = (file for root in verl.__path__ for file in Path(root).rglob("*.py"))
    return any(word.search(file.read_text(errors="ignore")) for file in files)


def check_dataclasses(config: DictConfig) -> None:
    """Build the dataclasses of verl that a run builds first, whose own checks are then ours.

    Raises:
        SiopConfigError: one of them refuses its values; the key is named where the refusing line names a field.
    """
    from verl.utils.config import omega_conf_to_dataclass

    for key in ("actor_rollout_ref.actor", ROLLOUT):
        section = OmegaConf.select(config, key)
        try:
            omega_conf_to_dataclass(section)
        except (InstantiationException, OmegaConfBaseException, TypeError, ValueError, AssertionError) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
            raise SiopConfigError(_refusal(key, section, cause)) from error


def _refusal(key: str, section: DictConfig, error: BaseException) -> str:
    """One line about what a dataclass refuses; some of verl's assertions say nothing."""
    import traceback

    line = (traceback.extract_tb(error.__traceback__) or [None])[-1]
    code = (line.line or "") if line else ""
    said = " ".join(str(error).split())[:300] or code
    for field in re.findall(r"self\.(\w+)", f"{code} {said}"):
        for path, name, owner in _keys(section, key):
            if name == field and not OmegaConf.is_missing(owner, name):
                return f"{path}={shown(owner[name])} is not allowed: {said}"
    return f"{key}: {said}"


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
