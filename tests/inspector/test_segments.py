"""A turn in pieces, and what equal queries and passages share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from verl.utils.siop.inspector.alarms import alarms
from verl.utils.siop.inspector.export import spread
from verl.utils.siop.inspector.segments import segments
from verl.utils.siop.turn_utils import THINKING


def kinds(text: str, thinking: bool = False) -> list[tuple[str, str]]:
    return [(one.kind, one.text) for one in segments(text, thinking)]


def test_the_pieces_of_a_turn_and_of_its_results() -> None:
    text = (
        '<think> so </think> hm <tool_call> {"name": "search", "arguments": {"query": " a b "}} </tool_call><|im_end|>'
    )
    assert kinds(text) == [("think", "so"), ("text", "hm"), ("call", "search: a b")]
    results = "<|im_end|>\n<|im_start|>user\n<tool_response> [1] one . [2] two </tool_response><|im_end|>\n"
    assert kinds(results) == [("passage", "[1] one ."), ("passage", "[2] two")]
    assert kinds("so it is</think><answer>x</answer>", thinking=True) == [("think", "so it is"), ("answer", "x")]
    assert kinds("<tool_call>search 1</tool_call>") == [("call", "search 1")]
    assert kinds("<think>cut") == [("think", "cut")]


@pytest.mark.parametrize("tags", THINKING)
def test_thinking_of_all_families(tags: tuple[str, str]) -> None:
    opening, closing = tags
    assert kinds(f"{opening} so {closing} hm <answer>x</answer>") == [("think", "so"), ("text", "hm"), ("answer", "x")]
    assert kinds(f"{opening}cut") == [("think", "cut")]
    expected = [("think", "so <answer>y</answer>"), ("answer", "x")]
    for start in ("", opening):
        assert kinds(f"{start}so <answer>y</answer>{closing}<answer>x</answer>", thinking=True) == expected
    assert kinds("so it", thinking=True) == [("think", "so it")]


def test_a_result_that_the_policy_writes_is_text() -> None:
    (piece,) = segments("<tool_response> [1] made up </tool_response>", own=True)
    assert (piece.kind, piece.text, piece.keys) == ("text", "<tool_response> [1] made up </tool_response>", [])


def test_keys_are_the_normal_form() -> None:
    call = '<tool_call>{{"name": "search", "arguments": {{"query": "{}"}}}}</tool_call>'
    one, other, third = (segments(call.format(q))[0].keys for q in ("The Tower!", "tower", "bridge"))
    assert one == other != third
    first, second = (segments(f"<tool_response>{n}a passage.</tool_response>")[0].keys for n in ("[1] ", "Doc 7: "))
    assert first == second != []


@given(st.text(alphabet="<>/abthinkanswer_tool_call \n", max_size=300), st.booleans())
def test_any_text_has_pieces_and_nothing_seen_is_lost(text: str, thinking: bool) -> None:
    found = "".join(one.text for one in segments(text, thinking))
    for letter in "bs":
        kept = found.count(letter)
        # Of the tags alone letters are left out.
        assert kept <= text.count(letter)


@given(st.lists(st.integers(), unique=True, max_size=40).map(sorted))
def test_steps_are_spread(steps: list[int]) -> None:
    found = spread(steps)
    assert sorted(found) == steps
    if steps:
        assert found[0] == steps[-1] and steps[0] in found[:2]


def curve(**last: float) -> dict[int, dict[str, float]]:
    """Ten healthy steps, then ten with these values."""
    healthy = {
        "siop/turns/mean": 3.0,
        "siop/outcome/em": 0.4,
        "siop/cluster_entropy": 1.0,
        "siop/zero_variance_groups": 0.1,
        "siop/no_answer": 0.0,
    }
    other = {name.replace("__", "/"): value for name, value in last.items()}
    return {step: {**healthy, **(other if step > 10 else {})} for step in range(1, 21)}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({}, []),
        ({"siop__turns__mean": 2.0, "siop__outcome__em": 0.0}, ["two_turns"]),
        ({"siop__turns__mean": 2.0}, []),
        ({"siop__turns__mean": 1.0, "siop__cluster_entropy": 0.0}, ["lock_in"]),
        ({"siop__zero_variance_groups": 1.0}, ["nothing_learnt"]),
        ({"siop__no_answer": 0.95}, ["no_answer"]),
    ],
)
def test_alarms_where_a_curve_looks_like_a_known_failure(last: dict[str, float], expected: list[str]) -> None:
    found = alarms(curve(**last))
    assert [alarm["kind"] for alarm in found] == expected
    assert all(6 <= alarm["step"] <= 11 for alarm in found)
