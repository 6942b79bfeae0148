"""Writes the dump of a step's rollouts; what it holds is described in :mod:`verl.utils.siop.inspector.schema`."""

from __future__ import annotations

import json
import logging
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from verl.trainer.siop.replay_buffer import column
from verl.trainer.siop.rollouts.rows import group_of, question_of
from verl.utils.siop.credit.batch import gains
from verl.utils.siop.credit.config import SiopConfig
from verl.utils.siop.files import write_whole
from verl.utils.siop.inspector.schema import DUMP_VERSION, SETTINGS_FILE, STEPS_FILE, DumpedSettings, DumpedStep
from verl.utils.siop.turn_utils import boundaries, extract_answer

logger = logging.getLogger(__name__)

Range = tuple[int, int]

# What rollouts are asked of the trainer's queue for; the estimator's values are there once it has run.
FIELDS = ("prompts", "responses", "rm_scores", "reward_model", "raw_prompt", "extra_info", "advantages", "returns")
KL_FIELD = "token_level_rewards"
# Of the algorithm section: where the scorer is, not what the credit is.
_ELSEWHERE = ("siop_scorer_url", "siop_scorer_timeout_s", "siop_streaming", "siop_on_scorer_error")


def settings_of(config: DictConfig, siop: SiopConfig) -> DumpedSettings:
    """What the credit of a training depends on, from verl's whole configuration."""
    algorithm = OmegaConf.to_container(config.algorithm, resolve=True)
    assert isinstance(algorithm, dict)
    own = config.algorithm.adv_estimator == "siop"
    return DumpedSettings(
        method=siop.siop_reward_mode if own else config.algorithm.adv_estimator,
        seed=OmegaConf.select(config, "data.seed"),
        algorithm={str(key): value for key, value in algorithm.items() if key not in _ELSEWHERE},
        rollouts=OmegaConf.select(config, "actor_rollout_ref.rollout.n"),
        temperature=OmegaConf.select(config, "actor_rollout_ref.rollout.temperature"),
    )


def write_settings(folder: Path, settings: DumpedSettings) -> None:
    """``settings-HASH.json``, unless it is there."""
    path = folder / SETTINGS_FILE.format(settings.hash)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings.model_dump(), indent=1).encode())


def append_step(folder: Path, step: int, metrics: Mapping[str, Any]) -> None:
    """One line of ``steps.jsonl``; a number that JSON cannot hold (NaN) is left out."""
    values = {name: float(value) for name, value in metrics.items() if isinstance(value, numbers.Real)}
    finite = {name: value for name, value in values.items() if np.isfinite(value)}
    line = DumpedStep(dump_version=DUMP_VERSION, step=step, metrics=finite).model_dump_json()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / STEPS_FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def pieces(length: int, turns: Sequence[Range]) -> list[tuple[str, Range]]:
    """(role, range) of a response of L tokens: its assistant turns, and what lies between, before and after them.

    >>> pieces(9, [(0, 3), (6, 8)])
    [('assistant', (0, 3)), ('tool', (3, 6)), ('assistant', (6, 8)), ('tool', (8, 9))]
    """
    found: list[tuple[str, Range]] = []
    at = 0
    for start, end in [*turns, (length, length)]:
        if at < start:
            found.append(("tool", (at, start)))
        if start < end:
            found.append(("assistant", (start, end)))
        at = end
    return found


def by_turn(values_L: torch.Tensor, turns: Sequence[Range]) -> list[float | list[float]]:
    """For each turn its tokens' value, where they all have the same, else the list of them."""
    found: list[float | list[float]] = []
    for start, end in turns:
        values = values_L[start:end].tolist()
        found.append(values[0] if len(set(values)) == 1 else values)
    return found


def columns(
    keys: Sequence[str],
    data: TensorDict,
    turns: Sequence[Sequence[Range]],
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    settings: DumpedSettings,
    siop: SiopConfig | None,
) -> dict[str, list[Any]]:
    """The fields of the rollouts ``keys``, each a column, but for ``step``, which verl adds.

    Args:
        keys: ``{uid}_{session}_{trajectory}``, in the order of the lines.
        data: their :data:`FIELDS`, and :data:`KL_FIELD` where the reward has a KL penalty.
        turns: the assistant turns of each, as they were before a question was dropped.
        records: what the step noted of each: the stages of the method, outcome, tool calls, and the group, where
            the agent loop made some.
        tokenizer: the policy's.
        settings: of the training.
        siop: the method's keys; None with another estimator.
    """
    names = sorted({name for record in records for name in record})
    found: dict[str, list[Any]] = {name: [record.get(name) for record in records] for name in names}
    fields = {name: column(data, name) for name in (*FIELDS, KL_FIELD) if name in data.keys()}  # noqa: SIM118
    rows = [_row(i, fields, turns[i], records[i], tokenizer, siop) for i in range(len(keys))]
    found.update({name: [row[name] for row in rows] for name in rows[0]})
    places = [group_of(key, record) for key, record in zip(keys, records, strict=True)]
    found.update(
        dump_version=[DUMP_VERSION] * len(keys),
        uid=list(keys),
        group=[group for group, _ in places],
        session=[number for _, number in places],
        method=[settings.method] * len(keys),
        settings=[settings.hash] * len(keys),
        seed=[settings.seed] * len(keys),
        gts=[label.get("ground_truth") for label in fields["reward_model"]],
        score=[float(scores.sum()) for scores in fields["rm_scores"]],
    )
    return found


def _row(
    i: int,
    fields: Mapping[str, Any],
    turns: Sequence[Range],
    record: Mapping[str, Any],
    tokenizer: Any,
    siop: SiopConfig | None,
) -> dict[str, Any]:
    prompt, response = fields["prompts"][i], fields["responses"][i]
    spans: list[dict[str, Any]] = []
    texts: list[str] = []
    at = 0
    # Decoded piece by piece, so that each character belongs to one.
    for role, (start, end) in pieces(len(response), turns):
        texts.append(tokenizer.decode(response[start:end]))
        spans.append({"role": role, "tokens": [start, end], "chars": [at, at + len(texts[-1])]})
        at += len(texts[-1])
    support = record.get("support")
    question, answer = record.get("question"), record.get("answer")
    if question is None:
        question = question_of(fields["raw_prompt"][i], fields["extra_info"][i])
    if answer is None:
        answer = extract_answer(response.tolist(), turns, tokenizer, prompt.tolist())
    return {
        "input": tokenizer.decode(prompt),
        "output": "".join(texts),
        "question": question,
        "answer": answer,
        "spans": spans,
        "boundaries": boundaries(turns, siop.siop_boundary) if siop is not None and support else None,
        "gains": gains(support, siop) if siop is not None and support else None,
        "kl_rewards": _sums(fields[KL_FIELD][i], turns) if KL_FIELD in fields else None,
        "turn_returns": by_turn(fields["returns"][i], turns),
        "turn_advantages": by_turn(fields["advantages"][i], turns),
        "dropped": bool(record.get("dropped", False)),
    }


def _sums(values_L: torch.Tensor, turns: Sequence[Range]) -> list[float]:
    """For each turn the sum from its first token up to the next turn, as the estimator takes it."""
    starts = [start for start, _ in turns]
    ends = [*starts[1:], len(values_L)]
    return [float(values_L[start:end].double().sum()) for start, end in zip(starts, ends, strict=True)]
