"""What a question and a step of a dump come to: the numbers to search by, and those of the curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from verl.utils.siop.credit.answers import exact_match, parse_aliases
from verl.utils.siop.inspector.schema import OUTCOMES, DumpedRollout
from verl.utils.siop.nli_clustering import normalize_answer

# An answer with this support before any search was held from the start.
HELD = 0.5
# Turn rewards closer than this are the scorer's noise.
NOISE = 5e-5

FLAGS = {
    "changed": "the answer of the heaviest cluster is another than the last time the question was asked",
    "gold_nowhere": "the gold answer was in no cluster",
    "right_negative": "a right answer got a negative advantage",
    "stale_paid": f"a wrong answer that had a support of {HELD:g} or more before any search got a positive advantage",
    "no_answer": "a rollout has no answer",
    "no_update": "all advantages are 0",
    "dropped": "the question was left out of the update",
}


def gold_of(rollout: DumpedRollout) -> list[str]:
    """The gold answers of a rollout; none where the label has a form of its own."""
    try:
        return parse_aliases(rollout.gts)
    except ValueError:
        return []


def advantages_of(rollout: DumpedRollout) -> list[float] | None:
    """T advantages; the mean of a turn whose tokens differ."""
    if rollout.turn_advantages is None:
        return None
    return [value if isinstance(value, float) else _mean(value) for value in rollout.turn_advantages]


def main_outcome(outcomes: dict[str, float]) -> float | None:
    """The number that says best whether a rollout is right: the first of ``OUTCOMES``, else the first that there is."""
    for name in (*OUTCOMES, *outcomes):
        if name in outcomes:
            return outcomes[name]
    return None


def heaviest_answer(rollouts: Sequence[DumpedRollout]) -> str:
    """The first reference of the heaviest cluster, else the commonest answer; empty if there is no answer.

    Among equals the first in rollout order.
    """
    clustered = [rollout for rollout in rollouts if rollout.cluster is not None and rollout.references]
    if clustered:
        heaviest = max(clustered, key=lambda rollout: rollout.target or 0.0)
        return (heaviest.references or [""])[0]
    answers = Counter(rollout.answer for rollout in rollouts if rollout.answer)
    return answers.most_common(1)[0][0] if answers else ""


def question_summary(rollouts: Sequence[DumpedRollout]) -> dict[str, Any]:
    """One row of the list of questions, from the rollouts of one question in one step."""
    first = rollouts[0]
    gold = gold_of(first)
    turns = [len(rollout.turns) for rollout in rollouts]
    advantages = [advantages_of(rollout) for rollout in rollouts]
    flat = [value for row in advantages for value in row or ()]
    rewards = [reward for reward in map(_total, rollouts) if reward is not None]
    main = [main_outcome(rollout.outcomes()) for rollout in rollouts]
    known = [value for value in main if value is not None]
    ids = {rollout.cluster for rollout in rollouts if rollout.cluster is not None}
    answers = [rollout.final_answer for rollout in rollouts if rollout.final_answer is not None]
    answer = heaviest_answer(rollouts)
    return {
        "question": first.question or "",
        "rollouts": len(rollouts),
        "clusters": len(ids) if ids or (answers and not any(answers)) else None,
        "outcome": _mean(known) if known else None,
        "turns_min": min(turns),
        "turns_max": max(turns),
        "reward_min": min(rewards, default=None),
        "reward_max": max(rewards, default=None),
        "advantage_min": min(flat, default=None),
        "advantage_max": max(flat, default=None),
        "answer": answer,
        "answer_key": normalize_answer(answer) or answer,
        "gold_nowhere": int(_gold_nowhere(rollouts, gold)),
        "right_negative": sum(
            bool(row) and value == 1.0 and row[-1] < 0 for row, value in zip(advantages, main, strict=True) if row
        ),
        "stale_paid": sum(
            rollout.em == 0.0 and bool(rollout.support) and rollout.support[0] >= HELD and row[-1] > 0
            for rollout, row in zip(rollouts, advantages, strict=True)
            if row and rollout.support
        ),
        "no_answer": sum(not answer for answer in answers),
        "no_update": int(bool(flat) and not any(flat)),
        "dropped": int(first.dropped),
    }


def _total(rollout: DumpedRollout) -> float | None:
    """The sum of the turn rewards; of a method that does not pay turns the score."""
    return rollout.score if rollout.turn_rewards is None else math.fsum(rollout.turn_rewards)


def _gold_nowhere(rollouts: Sequence[DumpedRollout], gold: Sequence[str]) -> bool:
    answers = [rollout.answer for rollout in rollouts if rollout.cluster is not None and rollout.answer]
    return bool(gold and answers) and not any(exact_match(answer, gold) for answer in answers)


def step_summary(questions: Sequence[Sequence[DumpedRollout]]) -> dict[str, float]:
    """The curves of a step, under the names of README's metrics; what nothing is known of is left out."""
    rollouts = [rollout for group in questions for rollout in group]
    values: dict[str, list[float]] = {
        "siop/turns/mean": [float(len(rollout.turns)) for rollout in rollouts],
        "siop/no_answer": [float(not r.final_answer) for r in rollouts if r.final_answer is not None],
        "siop/support_first": [rollout.support[0] for rollout in rollouts if rollout.support],
        "siop/support_last": [rollout.support[-1] for rollout in rollouts if rollout.support],
        "siop/clusters_per_group": [
            float(len({rollout.cluster for rollout in group} - {None}))
            for group in questions
            if any(rollout.cluster is not None for rollout in group)
        ],
        "siop/cluster_entropy": [entropy for group in questions if (entropy := _entropy(group)) is not None],
        "siop/zero_variance_groups": [
            float(_no_variance(group)) for group in questions if group[0].turn_rewards is not None
        ],
    }
    for rollout in rollouts:
        for name, value in rollout.outcomes().items():
            values.setdefault(f"siop/outcome/{name}", []).append(value)
        for turn, reward in enumerate(rollout.turn_rewards or (), start=1):
            values.setdefault(f"siop/turn_reward/turn_{turn}/mean", []).append(reward)
    return {name: _mean(items) for name, items in values.items() if items}


def _entropy(group: Sequence[DumpedRollout]) -> float | None:
    counts = Counter(rollout.cluster for rollout in group if rollout.cluster is not None)
    total = counts.total()
    return math.fsum(n / total * math.log(total / n) for n in counts.values()) if total else None


def _no_variance(group: Sequence[DumpedRollout]) -> bool:
    rows = [rollout.turn_rewards or [0.0] * len(rollout.turns) for rollout in group]
    return all(
        len(row) == len(rows[0]) and all(abs(a - b) <= NOISE for a, b in zip(row, rows[0], strict=True)) for row in rows
    )


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return math.fsum(items) / len(items)


def by_question(rollouts: Sequence[Any], group: Callable[[Any], str]) -> list[list[Any]]:
    """The items of each question, in the order in which questions come."""
    found: dict[str, list[Any]] = {}
    for item in rollouts:
        found.setdefault(group(item), []).append(item)
    return list(found.values())
