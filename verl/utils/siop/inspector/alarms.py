"""Curves that look like a failure which README and docs/inspector.md describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

# Steps that a mean is taken over, so that one odd step is no alarm.
WINDOW = 5
# Below this share of what it was, a metric has fallen.
FALLEN = 0.5


def alarms(curves: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """What looks wrong in a run, as ``kind``, ``step`` (where it was first seen), ``metric`` and ``text``.

    Means over five steps in a row:

    - ``two_turns``: the turns fall to 2.1 or less from 2.4 or more, and the outcome to less than half of its best
    - ``lock_in``: the turns fall to 1.2 or less, and the entropy of the clusters to .05 or less
    - ``nothing_learnt``: no question has a variance in its advantages
    - ``no_answer``: nine rollouts in ten have no answer
    """
    steps = sorted(curves)
    found: dict[str, dict[str, Any]] = {}
    best_turns = best_outcome = 0.0
    for end in range(WINDOW, len(steps) + 1):
        window = steps[end - WINDOW : end]
        turns = _mean(curves, window, "siop/turns/mean")
        outcome = _mean(curves, window, "siop/outcome/em", "siop/outcome/success")
        entropy = _mean(curves, window, "siop/cluster_entropy")
        best_turns, best_outcome = max(best_turns, turns or 0.0), max(best_outcome, outcome or 0.0)
        stops = turns is not None and best_turns >= 2.4 and 1.2 < turns <= 2.1
        if stops and outcome is not None and outcome < FALLEN * best_outcome:
            text = (
                f"the turns have fallen to {turns:.2f} and the outcome to {outcome:.2f} from {best_outcome:.2f}: the "
                "policy stops after one search. Seen with the release's formulas: use the default baseline and "
                "boundary; and where most rollouts stop too early from the start: use ablation=informed"
            )
            found.setdefault("two_turns", _alarm("two_turns", window, "siop/turns/mean", text))
        if turns is not None and turns <= 1.2 and best_turns >= 1.5 and entropy is not None and entropy <= 0.05:
            text = (
                "the policy answers at once, and all rollouts alike: an answer that it was sure of without searching. "
                "Seen with siop_gain=prob, ablation=empo and release; use the default gain"
            )
            found.setdefault("lock_in", _alarm("lock_in", window, "siop/cluster_entropy", text))
        if (_mean(curves, window, "siop/zero_variance_groups") or 0.0) >= 1.0:
            text = (
                "no question gave an update: the rollouts of each agree in everything. Raise the temperature or the "
                "number of rollouts, or choose other questions"
            )
            metric = "siop/zero_variance_groups"
            found.setdefault("nothing_learnt", _alarm("nothing_learnt", window, metric, text))
        if (_mean(curves, window, "siop/no_answer") or 0.0) >= 0.9:
            text = "nine rollouts in ten have no answer: the prompt must ask for one, and the length allow it"
            found.setdefault("no_answer", _alarm("no_answer", window, "siop/no_answer", text))
    return list(found.values())


def _mean(curves: Mapping[int, Mapping[str, float]], window: Sequence[int], *names: str) -> float | None:
    """Over the window, of the first of these metrics that all its steps have."""
    for name in names:
        values = [curves[step][name] for step in window if name in curves[step]]
        if len(values) == len(window):
            return fmean(values)
    return None


def _alarm(kind: str, window: Sequence[int], metric: str, text: str) -> dict[str, Any]:
    return {"kind": kind, "step": window[0], "metric": metric, "text": text}
