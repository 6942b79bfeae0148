"""Step metrics of what became of the rollouts' tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHARES = {
    "invalid": "invalid_arguments",
    "unknown": "unknown_tool",
    "unparsed": "unparsed",
    "dropped": "dropped",
    "failed": "failed",
}


def tool_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of a step; a key whose mean would run over nothing is left out.

    Args:
        records: of each rollout what :class:`~verl.trainer.siop.rollouts.tool_calls.ToolRecord` counted.

    Returns:
        - ``siop/truncated``: share of rollouts of which the budget cut a turn, or left no room for an observation
        - ``siop/tool_calls/per_rollout``: attempted calls, mean over rollouts
        - shares of the attempted calls, the rest was executed: ``siop/tool_calls/unparsed`` (tried, but not in a form
          that verl's parser reads), ``/unknown`` (no such tool), ``/invalid`` (arguments that the tool does not take),
          ``/failed`` (the tool raised), ``/dropped`` (over ``max_parallel_calls``, or no turn was left)
        - ``siop/tool_calls/neutralised``: control tokens taken out of what the tools found, mean over rollouts

        All but the first only where a rollout had a tool.
    """
    if not records:
        return {}
    total = {key: sum(record[key] for record in records) for key in ("calls", "neutralised", *_SHARES.values())}
    metrics = {"siop/truncated": sum(record["truncated"] for record in records) / len(records)}
    if any(record["offered"] for record in records):
        metrics["siop/tool_calls/per_rollout"] = total["calls"] / len(records)
        metrics["siop/tool_calls/neutralised"] = total["neutralised"] / len(records)
        if total["calls"]:
            metrics.update({f"siop/tool_calls/{name}": total[key] / total["calls"] for name, key in _SHARES.items()})
    return metrics
