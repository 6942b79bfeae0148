"""What the trainer reads from a data row, for the run and for the checks before it alike, and from a rollout."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
from verl.utils.siop.errors import RolloutError, SiopError

# Keys of a rollout's extra_fields: a verifier's score of each turn, what the policy wrote in each, and the game and its
# spec, with which each score can be looked at again.
TURN_SCORES, ACTIONS, GAME = "turn_scores", "actions", "game"
# Of one that an agent loop returned several of in a session: what it is compared with, within its session.
GROUP = "group"
# Whether the rollouts of a task are a validation's; our workers set it, for verl does not tell an agent loop.
VALIDATES: ContextVar[bool | None] = ContextVar("VALIDATES", default=None)
# The outcome that siop_outcome_weight weighs, among a rollout's outcomes.
SUCCESS = "success"


def session_of(key: str) -> tuple[str, int, int]:
    """(uid, session, trajectory) of a TransferQueue key ``{uid}_{session}_{trajectory}``."""
    uid, session, trajectory = key.rsplit("_", 2)
    return uid, int(session), int(trajectory)


def group_of(key: str, fields: Mapping[str, Any]) -> tuple[str, int]:
    """What a rollout is compared with, and its number in there: its question and its session, unless its agent loop
    made groups within the session (:data:`GROUP` in ``extra_fields``)."""
    uid, session, trajectory = session_of(key)
    group = fields.get(GROUP)
    return (uid, session) if group is None else (f"{uid}_{session}_{group}", trajectory)


def question_of(messages: Sequence[Mapping[str, Any]], extra_info: Mapping[str, Any] | None) -> str:
    """The bare question: ``extra_info.question`` where the data has it, else the text of the last user message.

    Raises:
        SiopError: there is neither, or the first is no text.
    """
    named = (extra_info or {}).get("question")
    if named is not None and not isinstance(named, str):
        raise SiopError(f"extra_info.question is {named!r:.100}, needs a text")
    if named:
        return named
    users = [message["content"] for message in messages if message["role"] == "user"]
    if not users or not isinstance(users[-1], str):
        raise SiopError(f"no user message with text in the prompt, and no extra_info.question: {messages!r}")
    return users[-1]


def turn_scores_of(fields: Mapping[str, Any]) -> list[Any] | None:
    """A verifier's scores of the turns in a rollout's ``extra_fields``; None if there are none.

    Raises:
        RolloutError: they are no list, tuple or array.
    """
    scores = fields.get(TURN_SCORES)
    if isinstance(scores, np.ndarray):
        scores = scores.tolist()
    if scores is None:
        return None
    if not isinstance(scores, list | tuple):
        raise RolloutError(
            f"an agent loop gave extra_fields[{TURN_SCORES!r}]={scores!r:.100}; needs a list, one score a turn"
        )
    # verl's own agent loops leave an empty list.
    return [score.item() if isinstance(score, np.generic) else score for score in scores] or None


def sample_of(question: str) -> str:
    """The end of a question without marks of any markup: small vocabularies know no other words. A text of ours where
    nothing is left."""
    words = re.sub(r"[^\w\s?.,'-]", " ", question).split()
    return " ".join(words[-12:]) or "who ?"


def outcomes_of(fields: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in ``reward_extra_info`` of a rollout's ``extra_fields``, by their own names; not its ``score``.

    What is no finite number is left out: EM and F1 are None where a row has no label.
    """
    info = fields.get("reward_extra_info") or {}
    return {
        name: float(value)
        for name, value in info.items()
        if name != "score" and isinstance(value, numbers.Real) and math.isfinite(value)
    }
