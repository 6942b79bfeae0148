"""What is checked before Ray starts: a wrong key, file, row, prompt, tool, model or address ends the run at once."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.tools.local_search_tool import LocalSearchTool
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.siop.checks.choices import check_choices
from verl.trainer.siop.checks.data import KEYS, DataError, check_files, check_rows, first_row
from verl.trainer.siop.checks.policy import Policy, check_tool_length, load_policy
from verl.trainer.siop.checks.prompts import check_instructions, check_round_trips
from verl.trainer.siop.checks.retrievers import check_replicas, healths_of, retrievers_of
from verl.trainer.siop.checks.services import check_scorer, check_search
from verl.trainer.siop.checks.settings import check_settings
from verl.trainer.siop.checks.values import check_dataclasses, check_values
from verl.trainer.siop.rollouts.rows import question_of, sample_of
from verl.trainer.siop.scoring import measure_noise, open_client
from verl.trainer.siop.turn_clip import TURN_WEIGHT
from verl.utils.config import validate_config
from verl.utils.siop import cpu
from verl.utils.siop.errors import SiopConfigError, SiopError
from verl.utils.siop.siop_process_reward import SiopConfig

__all__ = [
    "CHECKS",
    "DataError",
    "Run",
    "check_before_start",
    "check_method",
    "check_overrides",
    "check_values",
    "forget_empty_variables",
]

logger = logging.getLogger(__name__)

# Longest wait for a scorer that is still loading.
SCORER_WAIT_S = 60.0
# For the answer to one query.
SEARCH_WAIT_S = 60.0
# Keys that the user has to set: where verl's own defaults, which are its authors' paths, are left in their place, and
# the variable of the launchers for each.
REQUIRED = {
    "actor_rollout_ref.model.path": ("~/models/deepseek-llm-7b-chat", "MODEL_PATH"),
    "data.train_files": ("~/data/rlhf/gsm8k/train.parquet", "TRAIN_FILE"),
    "data.val_files": ("~/data/rlhf/gsm8k/test.parquet", "VAL_FILE"),
}
# The check on which all others build.
VALUES = "keys and values"
SEARCH = "search"
# What the configuration and the tools' files take from the environment.
VARIABLES = ("SIOP_SCORER_URL", "RAY_ADDRESS", "RETRIEVER_URL", "TENSORBOARD_DIR", "MAX_TOOL_RESPONSE_LENGTH")


@dataclass
class Run:
    """A run that is about to start: its configuration, and what the checks make of it once and share.

    Args:
        config: the whole configuration.
        warn: gets what is no error, but worth a look.
        say: gets what is being waited for.
    """

    config: DictConfig
    warn: Callable[[str], None] = logger.warning
    say: Callable[[str], None] = logger.info
    # Of data.train_files and data.val_files, once they are checked.
    rows: dict[str, int] = field(default_factory=dict)

    @cached_property
    def siop(self) -> SiopConfig:
        return SiopConfig.from_algorithm(self.config.algorithm)

    @cached_property
    def policy(self) -> Policy:
        return load_policy(self.config)

    @cached_property
    def _row(self) -> dict[str, Any]:
        made = (self.config.data.get("custom_cls") or {}).get("path")
        question = [{"role": "user", "content": "who ?"}]
        return {self.config.data.prompt_key: question} if made else first_row(self.config)

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages of the first row; a question of ours where a class of the user's makes the rows."""
        messages: list[dict[str, Any]] = self._row[self.config.data.prompt_key]
        return messages

    @property
    def sample(self) -> str:
        """Of the first question; a text of ours where there is none, as in data that another check finds wrong."""
        try:
            question = question_of(self.prompt, self._row.get("extra_info"))
        except (SiopError, OmegaConfBaseException):
            question = ""
        return sample_of(question)

    @property
    def steps(self) -> int | None:
        """Steps of the training with all its earlier parts; None where a class of the user's makes the rows."""
        trainer, most = self.config.trainer, self.config.trainer.total_training_steps
        if KEYS[0] not in self.rows:
            return most
        steps = self.rows[KEYS[0]] // self.config.data.train_batch_size * trainer.total_epochs
        return steps if most is None else min(steps, most)

    @property
    def trains(self) -> bool:
        return not self.config.trainer.get("val_only", False)

    @property
    def trains_by_siop(self) -> bool:
        return self.trains and self.config.algorithm.adv_estimator == "siop"


def forget_empty_variables() -> None:
    """Treat an empty variable as an unset one, where OmegaConf's ``oc.env`` would take the empty text."""
    for name in VARIABLES:
        if os.environ.get(name) == "":
            del os.environ[name]


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuse an unknown ``algorithm.siop_*`` key of the command line with our message; Hydra's would advise a ``+``.

    Raises:
        SiopConfigError: naming the key and what it may have meant.
    """
    for argument in arguments:
        if found := re.match(r"[+~]{0,2}algorithm\.(siop_\w*)(?:=(.*))?", argument, re.DOTALL):
            key, value = found.groups()
            if key not in SiopConfig.__dataclass_fields__:
                SiopConfig.from_algorithm({key: value})


def check_before_start(
    config: DictConfig, say: Callable[[str], None] = logger.info, without: Collection[str] = ()
) -> Run:
    """Check everything that a user can get wrong and that is cheap to check, in the order of :data:`CHECKS`.

    Args:
        config: of the run.
        say: gets what is being waited for, and of a training by SIOP how references are probed and who scores them.
        without: names of checks that are not made.

    Returns:
        The run, with what the checks have found.

    Raises:
        SiopConfigError: a key, a value, a file, a row, a model; the message names it and says what is allowed.
        RetrieverUnavailable: the search tool's retriever does not answer.
        ScorerUnavailable: the method needs a scorer and none answers in time.
        ScorerError: the scorer refuses the token.
    """
    run = Run(config, say=say)
    for name, check in CHECKS:
        if name not in without:
            found = check(run)
            if name in TOLD and run.trains_by_siop:
                say(f"{TOLD[name]:9}{found}")
    return run


# ---------------------------------------------------------------------- the checks; each returns what it found
def _settings(run: Run) -> str:
    def required() -> None:
        missing = [
            f"{key} is not set; give it a value ({variable} of the launchers)"
            for key, (default, variable) in REQUIRED.items()
            if OmegaConf.select(run.config, key) == default and not Path(default).expanduser().exists()
        ]
        if missing:
            raise SiopConfigError("; ".join(missing))

    problems, found = list[str](), ""
    for check in (
        required,
        lambda: _check_platform(run.config),
        lambda: _check_rejection(run.config),
        lambda: check_method(run.config, run.siop),  # (imports siop_import, which may register names)
        lambda: check_choices(run.config),
        lambda: _check_learning(run),
        lambda: check_settings(run.config, run.siop),
    ):
        try:
            found = check() or found
        except SiopError as error:
            problems.append(str(error))
        except Exception:
            if not problems:  # else it is likely to be one of them
                raise
    if problems:
        raise SiopConfigError("; ".join(dict.fromkeys(problems)))
    return found


def _check_learning(run: Run) -> None:
    if run.trains_by_siop and run.config.actor_rollout_ref.rollout.n == 1:
        run.warn("actor_rollout_ref.rollout.n=1: a question's only rollout has no other to be compared with")
    if run.trains_by_siop and run.siop.siop_scorer == "policy":
        _check_router_replay(run.config)


def _verl(run: Run) -> str:
    check_dataclasses(run.config)
    config = copy.deepcopy(run.config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that there is no critic
            validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    except (AssertionError, ValueError, TypeError, NotImplementedError) as error:
        raise SiopConfigError(" ".join(str(error).split()) or type(error).__name__) from error
    return "its own checks pass"


def _tools(run: Run) -> str:
    check_tool_length(run.config, run.policy.tools)
    return f"{run.policy.path}; tools {', '.join(run.policy.tools) or 'none'}"


def _round_trips(run: Run) -> str:
    scored = run.trains_by_siop and run.siop.measures_support
    return check_round_trips(run.policy, run.siop if scored else None, run.sample, run.warn)


def _rows(run: Run) -> str:
    found = check_rows(run.config, run.siop, run.policy, run.warn, run.rows.__setitem__)
    check_instructions(run.policy, run.prompt, run.warn)
    return found


def _search(run: Run) -> str:
    """The retrievers alone: a query to a web search has its price, and what it has cached needs no service."""
    tools = {name: tool for name, tool in run.policy.tools.items() if isinstance(tool, LocalSearchTool)}
    return ask_tools(run, tools, run.sample, SEARCH_WAIT_S)


def ask_tools(run: Run, tools: Mapping[str, Any], sample: str, wait_s: float) -> str:
    """Whether every retriever answers, for an evaluation also all alike, and a query with each search tool.

    Raises:
        RetrieverUnavailable: one does not.
        SiopError: as :func:`check_search`; or the replicas of an evaluation differ.
    """
    urls = retrievers_of(tools)
    if run.trains:
        healths_of(urls, warn=lambda text: None)
    else:
        check_replicas(healths_of(urls, run.warn))
    return asyncio.run(check_search(tools, sample, run.warn, wait_s))


def needs_scorer(run: Run) -> bool:
    """Whether the run asks the scorer at all: not VPR; IGPO asks for support alone, which the policy may measure."""
    siop = run.siop
    return run.trains_by_siop and siop.needs_scorer and (siop.siop_scorer == "server" or not siop.siop_use_gold_ref)


def _scorer(run: Run) -> str:
    if not needs_scorer(run):
        return "not needed"
    found = asyncio.run(check_scorer(run.siop, run.policy, run.warn, SCORER_WAIT_S, say=run.say))
    if run.siop.siop_scorer == "policy" or not run.siop.measures_support:
        return found
    noise = asyncio.run(_noise_of_service(run))
    if noise > run.siop.siop_scorer_noise:
        # The estimator and the metrics read it there.
        OmegaConf.update(run.config, "algorithm.siop_scorer_noise", noise)
    return f"{found}; noise {noise:.1e}"


async def _noise_of_service(run: Run) -> float:
    async with open_client(run.siop) as client:
        return await measure_noise(client, run.policy.tokenizer, run.siop, run.sample)


# What the user should see of them, and its label.
TOLD = {"round trips": "prompts", "scorer": "scorer"}
CHECKS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    (VALUES, lambda run: check_values(run.config, run.warn)),
    ("settings", _settings),
    ("verl", _verl),
    ("model and tools", _tools),
    ("data files", lambda run: check_files(run.config)),
    ("round trips", _round_trips),
    ("data rows", _rows),
    (SEARCH, _search),
    ("scorer", _scorer),
)


def _check_platform(config: DictConfig) -> None:
    if (config.trainer.device == "cpu") != cpu.is_active():
        raise SiopConfigError(
            f"trainer.device={config.trainer.device} but VERL_PLATFORM={os.environ.get('VERL_PLATFORM', '')!r}: on a "
            "machine without a GPU use both hardware=cpu and VERL_PLATFORM=cpu, otherwise neither"
        )


def _check_rejection(config: DictConfig) -> None:
    rejection = (config.algorithm.get("rollout_correction") or {}).get("rollout_rs")
    if config.algorithm.adv_estimator == "siop" and rejection:
        raise SiopConfigError(
            f"algorithm.rollout_correction.rollout_rs={rejection} is not allowed with algorithm.adv_estimator=siop: it "
            "masks single tokens, and a turn is a run of unmasked tokens; set it to null"
        )


def check_method(config: DictConfig, siop: SiopConfig) -> None:
    """Check the method's keys against keys of verl that they must fit.

    Raises:
        SiopConfigError: a combination that cannot work, naming the keys.
    """
    if config.algorithm.adv_estimator != "siop":
        return
    mode = config.trainer.v1.trainer_mode
    if mode != "siop":
        raise SiopConfigError(
            f"trainer.v1.trainer_mode={mode} is not allowed with algorithm.adv_estimator=siop: that trainer computes "
            "no turn rewards; set it to siop"
        )
    gamma, rollout = config.algorithm.gamma, config.actor_rollout_ref.rollout
    if siop.siop_return == "min" and gamma != 1:
        raise SiopConfigError(
            f"algorithm.gamma={gamma} is not allowed with algorithm.siop_return=min, which has no discount; set it to 1"
        )
    if siop.siop_reward_mode == "query_consensus" and rollout.multi_turn.format != "hermes":
        raise SiopConfigError(
            f"actor_rollout_ref.rollout.multi_turn.format={rollout.multi_turn.format} is not allowed with "
            "algorithm.siop_reward_mode=query_consensus, which reads queries from hermes tool calls; set it to hermes"
        )
    if config.actor_rollout_ref.actor.policy_loss.loss_mode == "turn_clip":
        needed: dict[str, Any] = {
            "siop_advantage_mode": "turn_level",
            "siop_enable_two_pass": True,
            "siop_baseline": "turn_group",
            "siop_turn_weight": TURN_WEIGHT,
            "gamma": 1.0,
        }
        for key, value in needed.items():
            found = gamma if key == "gamma" else getattr(siop, key)
            if found != value:
                raise SiopConfigError(
                    f"algorithm.{key}={found} is not allowed with actor_rollout_ref.actor.policy_loss.loss_mode="
                    f"turn_clip, which reads each turn's gain back from its advantage; set it to {value}"
                )


def _check_router_replay(config: DictConfig) -> None:
    actor = config.actor_rollout_ref.actor
    for engine in ("megatron", "veomni"):
        mode = ((actor.get(engine) or {}).get("router_replay") or {}).get("mode", "disabled")
        if mode != "disabled":
            raise SiopConfigError(
                f"actor_rollout_ref.actor.{engine}.router_replay.mode={mode} is not allowed with "
                "algorithm.siop_scorer=policy: there are no recorded routes for references, which nobody sampled; set "
                "it to disabled"
            )
