"""When a step is said to teach nothing, what is said, and what ends the run."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
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
    number: int,
    answers: int | Sequence[str] = 8,
    *,
    learns: bool | None = True,
    rollouts: int = 8,
    silent: int = 0,
    offered: bool = True,
    **counts: int,
) -> Step:
    """``silent`` of the rollouts answer without a call; ``counts`` are of the others."""
    offers = ["search"] if offered else []
    records = [ToolRecord(offered=offers).as_dict()] * silent
    records += [ToolRecord(offered=offers, **(counts or GOOD)).as_dict()] * (rollouts - silent)
    texts = ["x"] * answers + [""] * (rollouts - answers) if isinstance(answers, int) else answers
    return Step(number, texts, records, learns, lambda row: f"rollout {row}\x1b\n")


def _looked_at(*steps: Step, action: str = "stop") -> NothingLearntAlarm:
    alarm = NothingLearntAlarm(action, CONFIG)
    for step in steps:
        alarm.look(step)
    return alarm


NOTHING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no answer": ({"answers": 0}, ["no answer in 8 of 8 rollouts", "<answer>", "data.train_files"]),
    "cut": ({"answers": 0, "truncated": 1, "executed": 1}, ["8 of 8 rollouts were cut: raise data.max_response_le"]),
    "no call": ({"unparsed": 0, "learns": False}, ["no tool call in 8 of 8 rollouts that had a tool\n", "qwen3_coder"]),
    "unread": ({"unparsed": 1}, ["none of 8 tool calls was executed: 8 not read", "multi_turn.format=qwen3_coder"]),
    "unknown": ({"unknown_tool": 1}, ["8 of an unknown tool", "other tools than search", "tool_config_path"]),
    "invalid": ({"invalid_arguments": 1}, ["8 with invalid arguments", "tool_schema"]),
    "mixed": ({"unknown_tool": 1, "invalid_arguments": 2}, ["16 with invalid arguments, 8 of an unknown tool"]),
    "failed": ({"failed": 1}, ["8 failed", "Error executing tool"]),
    "dropped": ({"dropped": 1}, ["8 dropped", "max_assistant_turns"]),
    "few calls": (
        {"unparsed": 3, "silent": 6, "learns": False},
        ["no tool call in 6 of 8 rollouts that had a tool, none of 6 tool calls was executed: 6 not read"],
    ),
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
    assert "step 2 (stopped after 2 such steps in a row)" in str(error.value)
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


@pytest.mark.parametrize("case", [case for case in NOTHING if case != "few calls"])
def test_chance_in_small_batches_is_no_stop(case: str) -> None:
    options = {"answers": 2, **NOTHING[case][0], "rollouts": 2}
    alarm = _looked_at(*(_step(number, **options) for number in range(1, 8)))
    with pytest.raises(NothingLearnt, match="stopped after 8 such steps"):
        alarm.look(_step(8, **options))


def test_only_the_rollouts_that_say_so_count(caplog: pytest.LogCaptureFixture) -> None:
    alarm = _looked_at(*(_step(number, unparsed=3, silent=4) for number in (1, 2, 3)))
    assert len(caplog.records) == 1 and "more such steps end the run" in caplog.text
    with pytest.raises(NothingLearnt, match="none of 12 tool calls was executed: 12 not read"):
        alarm.look(_step(4, unparsed=3, silent=4))


def test_nobody_right_in_a_small_batch_is_no_stop(caplog: pytest.LogCaptureFixture) -> None:
    """At a true EM of 5 %, two steps of 2 questions with 4 rollouts have none right with a probability of 44 %."""
    texts = [f"wrong {row}" for row in range(8)]
    _looked_at(*(_step(number, texts, learns=False) for number in range(1, 30)))
    assert len(caplog.records) == 1 and "more such steps end the run" in caplog.text
    # In 104 rollouts with one of 0.5 %.
    texts = [f"wrong {row}" for row in range(52)]
    with pytest.raises(NothingLearnt, match="every advantage is 0 in 52 of 52"):
        _looked_at(*(_step(number, texts, learns=False, rollouts=52) for number in (1, 2)))
    # All of them say the same: no chance.
    with pytest.raises(NothingLearnt, match="every advantage is 0 in 8 of 8"):
        _looked_at(*(_step(number, learns=False) for number in (1, 2)))
    # As long as one of the steps had several answers, it may be chance.
    _looked_at(_step(1, ["a", *"x" * 7], learns=False), _step(2, learns=False), _step(3, learns=False))


@pytest.mark.parametrize("resumed_at", [1, 5, 300])
@pytest.mark.parametrize("tries", [{"unparsed": 1}, {"unknown_tool": 2}, {"failed": 1}, {"dropped": 1}])
def test_a_healthy_run_in_which_few_try_a_call_goes_on(
    resumed_at: int, tries: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    few: dict[str, Any] = {"answers": 512, "rollouts": 512, "silent": 510, **tries}
    _looked_at(_step(1, answers=512, rollouts=512), *(_step(number, **few) for number in range(2, 9)))
    assert caplog.records == []
    _looked_at(*(_step(number, **few) for number in range(resumed_at, resumed_at + 20)))
    assert ("no use of tools can be learnt" in caplog.text) == (resumed_at < 300) == (len(caplog.records) == 1)
    assert "nothing" not in caplog.text.replace("siop_on_nothing_learnt", "")


def test_a_run_that_never_calls_is_warned_of_and_stopped_when_it_learns_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    alarm = _looked_at(*(_step(number, unparsed=0) for number in range(1, 6)))
    assert len(caplog.records) == 1 and "no use of tools can be learnt from step 1 (going on)" in caplog.text
    alarm.look(_step(6, unparsed=0, learns=False))
    with pytest.raises(NothingLearnt, match="nothing can be learnt from step 7"):
        alarm.look(_step(7, unparsed=0, learns=False))


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


def test_games_are_missed_for_their_actions(caplog: pytest.LogCaptureFixture) -> None:
    step = Step(1, [""] * 8, [], True, lambda row: "hm", wanted="action")
    with caplog.at_level(logging.WARNING):
        NothingLearntAlarm("warn", CONFIG).look(step)
    assert "no action in 8 of 8 rollouts" in caplog.text and "<action>…</action>" in caplog.text
