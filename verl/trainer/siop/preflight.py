"""What is checked before Ray starts: a wrong key, file, column, prompt, model or address ends the run at once."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import DictConfig, ListConfig
from tqdm import tqdm
from verl.trainer.siop.turn_clip import TURN_WEIGHT
from verl.utils.siop import cpu
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.scoring_client import ScoringClient
from verl.utils.siop.siop_process_reward import SiopConfig

logger = logging.getLogger(__name__)

# Columns of verl's RL parquet format that training and evaluation read, and their arrow types.
COLUMNS = {"data_source": "string", "prompt": "list", "reward_model": "struct"}


class DataError(SiopConfigError):
    """A data file is missing, or its content is not what verl's RL format needs."""


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


def check_before_start(config: DictConfig) -> None:
    """Check everything that a user can get wrong and that is cheap to check.

    Raises:
        SiopConfigError: a key, a value, a file, a model; the message names it and says what is allowed.
        ScorerUnavailable: the method needs a scorer and none answers in time.
        ScorerError: the scorer refuses the token.
    """
    siop = SiopConfig.from_algorithm(config.algorithm)
    _check_platform(config)
    _check_rejection(config)
    check_method(config, siop)
    tokenizer = _tokenizer(config)
    for key in ("train_files", "val_files"):
        for path in _files(config.data[key]):
            check_parquet(path, f"data.{key}")
            if not config.data.filter_overlong_prompts:
                check_prompts(path, tokenizer, config.data)
    _check_tool_config(config)
    if config.algorithm.adv_estimator == "siop" and not config.trainer.get("val_only", False):
        if config.actor_rollout_ref.rollout.n == 1:
            logger.warning("actor_rollout_ref.rollout.n=1: nothing is learnt from a question that has one rollout")
        if siop.siop_scorer == "policy":
            _check_router_replay(config)
        # IGPO asks for support alone.
        if siop.siop_scorer == "server" or not siop.siop_use_gold_ref:
            asyncio.run(_check_scorer(siop))


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


def _tokenizer(config: DictConfig) -> Any:
    from transformers import AutoTokenizer

    model = config.actor_rollout_ref.model
    path = model.get("tokenizer_path") or model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.get("trust_remote_code", False))
    except (OSError, ValueError) as error:
        raise SiopConfigError(f"actor_rollout_ref.model.path={path}: no tokenizer can be loaded: {error}") from error
    if not tokenizer.chat_template and not model.get("custom_chat_template"):
        raise SiopConfigError(
            f"actor_rollout_ref.model.path={path}: the tokenizer has no chat template; use an instruction-tuned model "
            "or set actor_rollout_ref.model.custom_chat_template"
        )
    return tokenizer


def _files(value: Any) -> list[str]:
    return [str(x) for x in value] if isinstance(value, list | ListConfig) else [str(value)]


def check_parquet(path: str, key: str) -> None:
    """Check that a file is parquet in verl's RL format, by its schema alone.

    Raises:
        DataError: naming the configuration key, the file and the column.
    """
    if not Path(path).expanduser().is_file():
        raise DataError(f"{key}={path}: no such file")
    try:
        schema = pq.read_schema(Path(path).expanduser())
    except (OSError, ValueError) as error:
        raise DataError(f"{key}={path}: not a parquet file: {error}") from error
    for column, kind in COLUMNS.items():
        if column not in schema.names:
            raise DataError(f"{key}={path}: column '{column}' is missing; found {sorted(schema.names)}")
        found = str(schema.field(column).type)
        if not found.removeprefix("large_").startswith(kind):
            raise DataError(f"{key}={path}: column '{column}' has type {found}, needs {kind}")
    if "ground_truth" not in [field.name for field in schema.field("reward_model").type]:
        raise DataError(f"{key}={path}: column 'reward_model' has no field 'ground_truth' (it may hold nulls)")


def _messages(path: str) -> Iterator[list[dict[str, str]]]:
    with pq.ParquetFile(Path(path).expanduser()) as file:
        for batch in file.iter_batches(batch_size=1024, columns=["prompt"]):
            yield from batch.column(0).to_pylist()


def check_prompts(path: str, tokenizer: Any, data: DictConfig) -> None:
    """Check that every prompt fits ``data.max_prompt_length`` (skipped with ``data.filter_overlong_prompts=true``).

    Raises:
        DataError: naming the file, the row, the length and the limit.
    """
    rows = pq.read_metadata(Path(path).expanduser()).num_rows
    if not rows:
        raise DataError(f"{path}: the file has no rows")
    extra = {str(key): value for key, value in (data.get("apply_chat_template_kwargs") or {}).items()}
    for row, messages in enumerate(tqdm(_messages(path), total=rows, desc=f"check {path}", disable=rows < 5000)):
        if not messages or any(not m.get("role") or m.get("content") is None for m in messages):
            raise DataError(f"{path}: row {row}: 'prompt' must be a list of messages with role and content")
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **extra)
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if length > data.max_prompt_length:
            raise DataError(
                f"{path}: row {row}: the prompt has {length} tokens, data.max_prompt_length is "
                f"{data.max_prompt_length}; raise it or set data.filter_overlong_prompts=true"
            )


def _check_tool_config(config: DictConfig) -> None:
    multi_turn = config.actor_rollout_ref.rollout.multi_turn
    path = multi_turn.get("tool_config_path")
    if multi_turn.enable and path and not Path(path).is_file():
        raise SiopConfigError(f"actor_rollout_ref.rollout.multi_turn.tool_config_path={path}: no such file")


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


async def _check_scorer(siop: SiopConfig) -> None:
    async with ScoringClient(siop.siop_scorer_url, timeout_s=siop.siop_scorer_timeout_s) as client:
        health = await client.wait_ready(timeout_s=min(60.0, siop.siop_scorer_timeout_s))
        await client.check_token()
    if siop.siop_scorer == "server" and health.get("engine") == "none":
        raise SiopConfigError(
            f"algorithm.siop_scorer=server, but the scorer at {siop.siop_scorer_url} has no language model: start it "
            "with one (SIOP_MODEL), or set algorithm.siop_scorer=policy"
        )
