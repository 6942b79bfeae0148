"""Query consensus pays for calls that were executed, whatever the text of a turn looks like."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from method_helpers import rollout, run, tool_result
from verl.utils.siop.errors import RolloutError
from verl.utils.siop.siop_process_reward import Rollout


def _call(query: str, name: str = "search") -> tuple[str, str]:
    return name, json.dumps({"query": query})


def _rollout(query: str, *, executed: list[list[tuple[str, str]]] | None) -> Rollout:
    name, arguments = _call(query)
    call = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call><|im_end|>'
    turns = [call, "<answer>x</answer><|im_end|>"]
    return replace(rollout("a", turns, [tool_result("found")]), executed_calls=executed)


def _consensus(*batch: Rollout) -> list[list[float]]:
    return run(batch, siop_reward_mode="query_consensus").turn_rewards


def test_only_executed_calls_are_counted_and_paid() -> None:
    # In the text all three search for the same thing.
    text = [_rollout("Capital", executed=None) for _ in range(3)]
    assert _consensus(*text) == [[1.0, 1.0]] * 3
    ran: list[list[tuple[str, str]]] = [[_call("capital!")], []]
    not_run: list[list[tuple[str, str]]] = [[], []]
    batch = [_rollout("Capital", executed=executed) for executed in (ran, ran, not_run)]
    assert _consensus(*batch) == [[0.5, 1.0], [0.5, 1.0], [0.0, 1.0]]
    assert _consensus(*(_rollout("Capital", executed=not_run) for _ in range(3))) == [[0.0, 1.0]] * 3
    # Where nobody recorded what ran, the text counts.
    assert _consensus(batch[0], text[0]) == [[1.0, 1.0]] * 2


def test_what_was_executed_is_counted_in_any_format_and_with_its_tool() -> None:
    other = [[_call("capital", "maps")], []]
    batch = [rollout("a", ["call of another format", "<answer>x</answer>"], [tool_result("found")]) for _ in range(2)]
    same = [replace(item, executed_calls=[[_call("capital"), _call("river")], []]) for item in batch]
    assert _consensus(*same) == [[1.0, 1.0]] * 2
    assert _consensus(same[0], replace(batch[1], executed_calls=other)) == [[0.0, 1.0]] * 2


@pytest.mark.parametrize("call", [("search", "{bad"), ("search", {"query": "x"}), ("search",), None])
def test_a_record_of_no_calls_is_refused(call: Any) -> None:
    with pytest.raises(RolloutError, match="rollout of question 'a': executed calls are pairs of a name and its argum"):
        _consensus(_rollout("x", executed=[[call], []]))


def test_a_record_of_other_turns_is_refused() -> None:
    with pytest.raises(RolloutError, match="2 assistant turns in its mask, but executed calls of 1"):
        _consensus(_rollout("x", executed=[[]]), _rollout("x", executed=None))
