"""What the page shows of a question: its clusters, and each rollout turn by turn."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from verl.utils.siop.inspector.schema import DumpedRollout, not_finite, whole_characters
from verl.utils.siop.inspector.segments import segments
from verl.utils.siop.inspector.summary import advantages_of, gold_of

# Longer texts of a span are cut in the page, which says so; the dump has them whole.
MAX_CHARACTERS = 20_000

# Turn values by name, of each rollout by its uid.
Other = Mapping[str, Mapping[str, Sequence[float]]]


def question_view(rollouts: Sequence[DumpedRollout], other: Other | None = None) -> dict[str, Any]:
    """A question with all its rollouts.

    Args:
        rollouts: of one question in one step.
        other: ``rewards`` and ``advantages`` under other keys, by uid.
    """
    first = rollouts[0]
    return {
        "step": first.step,
        "group": first.group,
        "question": first.question or "",
        "prompt": first.input[:MAX_CHARACTERS],
        "gold": gold_of(first),
        "method": first.method,
        "version": first.dump_version,
        "dropped": first.dropped,
        "not_finite": not_finite(rollouts),
        "clusters": _clusters(rollouts),
        "rollouts": [_rollout(rollout, (other or {}).get(rollout.uid)) for rollout in rollouts],
    }


def _clusters(rollouts: Sequence[DumpedRollout]) -> list[dict[str, Any]]:
    """Heaviest first."""
    found: dict[int, dict[str, Any]] = {}
    for rollout in rollouts:
        if rollout.cluster is None:
            continue
        one = found.setdefault(
            rollout.cluster,
            {
                "id": rollout.cluster,
                "target": rollout.target,
                "mass": rollout.mass,
                "votes": rollout.votes,
                "evidence": rollout.evidence,
                "references": rollout.references or [],
                "size": 0,
            },
        )
        one["size"] += 1
    return sorted(found.values(), key=lambda one: -(one["target"] or 0.0))


def _rollout(rollout: DumpedRollout, other: Mapping[str, Sequence[float]] | None) -> dict[str, Any]:
    return {
        "uid": rollout.uid,
        "session": rollout.session,
        "answer": rollout.final_answer,
        "cluster": rollout.cluster,
        "outcomes": rollout.outcomes(),
        "score": rollout.score,
        "support": rollout.support or [],
        "boundaries": rollout.boundaries,
        "turns": _turns(rollout),
        "other": other,
        "calls": {
            name: value
            for name, value in (rollout.siop_tools or {}).items()
            if isinstance(value, int) and value and name not in ("calls", "executed", "thinking")
        },
    }


def _turns(rollout: DumpedRollout) -> list[dict[str, Any]]:
    """The assistant turns, each with what came back; what came before the first has a turn without numbers."""
    values = {
        "gain": rollout.gains,
        # No rewards are zeros in the update.
        "reward": rollout.turn_rewards or ([0.0] * len(rollout.turns) if rollout.turn_rewards is not None else None),
        "kl_reward": rollout.kl_rewards,
        "return": _numbers(rollout.turn_returns),
        "advantage": advantages_of(rollout),
        "score": rollout.turn_scores,
    }
    thinking = bool((rollout.siop_tools or {}).get("thinking"))
    found: list[dict[str, Any]] = []
    number = 0
    for span in rollout.spans or ():
        text = rollout.text(span)
        cut = max(0, len(text) - MAX_CHARACTERS)
        own = span.role == "assistant"
        shown = [dataclasses.asdict(one) for one in segments(text[:MAX_CHARACTERS], thinking and own, own)]
        for one in shown:
            one["text"] = whole_characters(one["text"])  # the arguments of a call are JSON of the model
            # Short, and the same in every rollout.
            one["keys"] = [hashlib.sha256(key.encode()).hexdigest()[:12] for key in one["keys"]]
        if own:
            numbers = {name: row[number] for name, row in values.items() if row is not None and number < len(row)}
            found.append({"tokens": span.tokens, "segments": shown, "results": [], "cut": cut, **numbers})
            number += 1
        elif found:
            found[-1]["results"] += shown
            found[-1]["cut"] += cut
        elif shown:
            found.append({"tokens": span.tokens, "segments": [], "results": shown, "cut": cut, "before": True})
    return found


def _numbers(values: Sequence[float | list[float]] | None) -> list[float] | None:
    if values is None:
        return None
    return [value if isinstance(value, float) else sum(value) / len(value) for value in values]
