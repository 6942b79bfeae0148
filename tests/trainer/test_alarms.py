"""When a step is said to teach nothing, what is said, and what ends the run."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl.trainer.siop.rollouts.alarms import NothingLearnt, NothingLearntAlarm, Step, shown
from verl.trainer.siop.rollouts.metrics import tool_metrics
from verl.trainer.siop.rollouts.tool_calls import ToolRecord

CONFIG = OmegaConf.create(
    {
        "actor_rollout_ref": {"rollout": {"temperature": 0.5, "n": 4, "multi_turn": {"format": "qwen3_coder"}}},
        "data": {"max_response_length": 99},
        "trainer": {"rollout_data_dir": "out/rollouts"},
    }
)
GOOD: dict[str, Any] = {"executed": 2}


def _step(
    number: int, answers: int = 8, *, learns: bool | None = True, rollouts: int = 8, offered: bool = True, **counts: int
) -> Step:
    record = ToolRecord(offered=["search"] if offered else [], **(counts or GOOD))
    records = [record.as_dict()] * rollouts
    return Step(
        number, ["x"] * answers + [""] * (rollouts - answers), records, learns, lambda row: f"rollout {row}\x1b\n"
    )


def _looked_at(*steps: Step, action: str = "stop") -> NothingLearntAlarm:
    alarm = NothingLearntAlarm(action, CONFIG)
    for step in steps:
        alarm.look(step)
    return alarm


NOTHING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no answer": ({"answers": 0}, ["no answer in 8 of 8 rollouts", "<answer>", "data.train_files"]),
    "cut": ({"answers": 0, "truncated": 1, "executed": 1}, ["8 of 8 rollouts were cut: raise data.max_response_le"]),
    "no call": ({"unparsed": 0}, ["no tool call in 8 of 8 rollouts that had a tool", "format=qwen3_coder"]),
    "unread": ({"unparsed": 1}, ["none of 8 tool calls was executed: 8 not read", "multi_turn.format=qwen3_coder"]),
    "unknown": ({"unknown_tool": 1}, ["8 of an unknown tool", "other tools than search", "tool_config_path"]),
    "invalid": ({"invalid_arguments": 1}, ["8 with invalid arguments", "tool_schema"]),
    "mixed": ({"unknown_tool": 1, "invalid_arguments": 2}, ["16 with invalid arguments, 8 of an unknown tool"]),
    "failed": ({"failed": 1}, ["8 failed", "Error executing tool"]),
    "dropped": ({"dropped": 1}, ["8 dropped", "max_assistant_turns"]),
    "no variance": ({"learns": False}, ["every advantage is 0 in 8 of 8", "temperature (now 0.5)", "n (now 4)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING)
def test_two_such_steps_end_the_run_with_one_block(case: str, caplog: pytest.LogCaptureFixture) -> None:
    options, texts = NOTHING[case]
    alarm = _looked_at(_step(1, **options))
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING and "the next such step ends the run" in warning.message
    with pytest.raises(NothingLearnt) as error:
        alarm.look(_step(2, **options))
    for text in (warning.message, str(error.value)):
        for part in (
            *texts,
            r"end of what a rollout wrote: rollout 0\x1b\n",
            "siop_on_nothing_learnt=stop (stop, warn)",
        ):
            assert part in text
    assert "step 2 (stopped after two such steps in a row)" in str(error.value)
    assert "\x1b" not in str(error.value) and "out/rollouts" in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize("case", NOTHING)
def test_warn_tells_each_kind_once(case: str, caplog: pytest.LogCaptureFixture) -> None:
    options, _ = NOTHING[case]
    _looked_at(*(_step(number, **options) for number in range(1, 9)), action="warn")
    assert len(caplog.records) == 1 and "going on" in caplog.text


def test_a_new_kind_is_told_beside_one_that_was_told(caplog: pytest.LogCaptureFixture) -> None:
    _looked_at(_step(1, 0), _step(2, 0), _step(3, 0, unparsed=3), action="warn")
    assert len(caplog.records) == 2 and "no answer" not in caplog.records[1].message


def test_several_kinds_make_one_block(caplog: pytest.LogCaptureFixture) -> None:
    alarm = _looked_at(_step(1, 0, learns=False, unparsed=1))
    assert len(caplog.records) == 1
    for text in ("no answer in", "none of 8 tool calls", "every advantage is 0", "it follows from the above"):
        assert caplog.text.count(text) == 1
    with pytest.raises(NothingLearnt):
        alarm.look(_step(2, 0, learns=False, unparsed=1))


@pytest.mark.parametrize("case", NOTHING)
def test_a_better_step_between_is_no_stop(case: str) -> None:
    options, _ = NOTHING[case]
    _looked_at(*(_step(n, **(options if n % 2 else {})) for n in range(1, 30)))


def test_after_the_start_a_policy_may_know_its_questions_by_heart(caplog: pytest.LogCaptureFixture) -> None:
    late = [_step(n, learns=False, dropped=1) for n in range(2, 30)] + [_step(n, unparsed=0) for n in range(30, 60)]
    _looked_at(_step(1), *late)
    # Resumed, or with another thing wrong for ten steps.
    _looked_at(*late[10:])
    _looked_at(*(_step(n, learns=None, unparsed=0) for n in range(300, 305)))
    assert caplog.records == []


@pytest.mark.parametrize("case", ["no answer", "unread", "unknown", "invalid", "failed"])
def test_a_collapse_ends_the_run_at_any_time(case: str) -> None:
    options, _ = NOTHING[case]
    alarm = _looked_at(*(_step(n) for n in range(1, 50)), _step(50, learns=None, **options))
    with pytest.raises(NothingLearnt, match="step 51"):
        alarm.look(_step(51, learns=None, **options))


def test_chance_in_small_batches_is_no_stop(caplog: pytest.LogCaptureFixture) -> None:
    _looked_at(*(_step(n, rollouts=2, answers=2, learns=False) for n in range(1, 9)))
    assert len(caplog.records) == 1
    with pytest.raises(NothingLearnt):
        _looked_at(*(_step(n, rollouts=2, answers=0) for n in (1, 2)))


def test_without_tools_or_counts_calls_are_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    none = [Step(n, ["x"] * 8, [], True, str) for n in (1, 2, 3)]
    _looked_at(*none)
    _looked_at(*(_step(n, offered=False, unparsed=0) for n in (1, 2, 3)))
    assert caplog.records == []


def test_the_example_is_the_end_on_one_line() -> None:
    assert shown("é\t\x00\ud800 <answer>") == r"é\t\x00\ud800 <answer>"
    assert len(shown("a" * 9999)) == 401 and shown("a" * 9999).startswith("…a")


def test_tool_metrics_are_shares_of_attempted_calls() -> None:
    first = ToolRecord(executed=2, unparsed=1, dropped=1, truncated=1, neutralised=3, offered=["search"])
    second = ToolRecord(unknown_tool=1, invalid_arguments=2, failed=1, offered=["search"])
    assert tool_metrics([first.as_dict(), second.as_dict()]) == {
        "siop/truncated": 0.5,
        "siop/tool_calls/per_rollout": 4.0,
        "siop/tool_calls/neutralised": 1.5,
        "siop/tool_calls/unparsed": 1 / 8,
        "siop/tool_calls/unknown": 1 / 8,
        "siop/tool_calls/invalid": 2 / 8,
        "siop/tool_calls/failed": 1 / 8,
        "siop/tool_calls/dropped": 1 / 8,
    }
    silent = ToolRecord(offered=["search"]).as_dict()
    assert set(tool_metrics([silent])) == {
        "siop/truncated",
        "siop/tool_calls/per_rollout",
        "siop/tool_calls/neutralised",
    }
    assert tool_metrics([ToolRecord().as_dict()]) == {"siop/truncated": 0.0} and tool_metrics([]) == {}
