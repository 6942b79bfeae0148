"""The index finds what the dump holds, follows a run that goes on, and says what it could not read."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from dumped_run import lines_of, questions, write_game, write_run, write_step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from verl.trainer.siop.rollouts import dump
from verl.utils.siop.inspector.alarms import alarms
from verl.utils.siop.inspector.dump import Dump
from verl.utils.siop.inspector.index import INDEX_FILE, RunIndex, Search
from verl.utils.siop.inspector.runs import Runs
from verl.utils.siop.inspector.schema import DumpError
from verl.utils.siop.inspector.summary import FLAGS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", steps=6)


@pytest.fixture(scope="module")
def index(run: Path) -> RunIndex:
    found = RunIndex(Dump(run))
    found.refresh()
    return found


def test_every_question_is_there_with_its_rollouts(run: Path, index: RunIndex) -> None:
    found = index.search(Search(limit=500))
    assert found["total"] == len(found["questions"]) == 18
    for question in found["questions"]:
        rollouts = index.rollouts(question["step"], question["group"])
        assert len(rollouts) == question["rollouts"] == 4
        assert {rollout.group for rollout in rollouts} == {question["group"]}
        sums = [sum(rollout.turn_rewards or ()) for rollout in rollouts]
        assert question["reward_min"] == pytest.approx(min(sums))
        assert question["outcome"] == pytest.approx(sum(rollout.em or 0.0 for rollout in rollouts) / 4)
        advantages = [value for rollout in rollouts for value in rollout.turn_advantages or ()]
        assert question["advantage_max"] == max(advantages)  # type: ignore[type-var]
        right = [r for r in rollouts if r.em == 1 and r.turn_advantages and r.turn_advantages[-1] < 0]  # type: ignore[operator]
        assert question["right_negative"] == len(right)
    assert any(question["right_negative"] for question in found["questions"])
    assert (run / "rollouts" / INDEX_FILE).is_file()
    state = index.state()
    assert (state["steps"], state["last_step"], state["rollouts"], state["version"]) == (6, 6, 72, 2)


def test_a_question_whose_answer_changed_since_it_was_last_asked(index: RunIndex) -> None:
    found = index.search(Search(limit=500, sort="question"))["questions"]
    last: dict[str, str] = {}
    for question in sorted(found, key=lambda q: q["step"]):
        before = last.get(question["question"])
        assert question["changed"] == int(bool(before and question["answer_key"]) and before != question["answer_key"])
        if question["answer_key"]:
            last[question["question"]] = question["answer_key"]
    assert {question["changed"] for question in found} == {0, 1}


BOUNDS = st.none() | st.integers(-2, 6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["step", "clusters", "outcome", "reward", "advantage", "turns"]),
                       st.tuples(BOUNDS, BOUNDS), max_size=3),
       st.lists(st.sampled_from(sorted(FLAGS)), max_size=2, unique=True))  # fmt: skip
def test_a_search_is_a_filter_of_the_whole_list(
    index: RunIndex, bounds: dict[str, tuple[int | None, int | None]], flags: list[str]
) -> None:
    def holds(question: dict[str, Any]) -> bool:
        for name, (low, high) in bounds.items():
            spread = name in ("reward", "advantage", "turns")
            top, bottom = (question[f"{name}_max"], question[f"{name}_min"]) if spread else (question[name],) * 2
            if low is not None and not (top is not None and top >= low):
                return False
            if high is not None and not (bottom is not None and bottom <= high):
                return False
        return all(question[flag] > 0 for flag in flags)

    everything = index.search(Search(limit=500))["questions"]
    values = {f"{name}_{end}": bound for name, pair in bounds.items() for end, bound in zip(("from", "to"), pair)}  # noqa: B905
    found = index.search(Search(limit=500, flags=flags, **values))  # type: ignore[arg-type]
    assert found["questions"] == [question for question in everything if holds(question)]


def test_pages_and_orders(index: RunIndex) -> None:
    whole = index.search(Search(limit=500, sort="advantage_min", descending=True))["questions"]
    values = [question["advantage_min"] for question in whole]
    assert values == sorted(values, reverse=True)
    pages = [
        index.search(Search(limit=5, offset=at, sort="advantage_min", descending=True))["questions"]
        for at in range(0, 18, 5)
    ]
    assert [question for page in pages for question in page] == whole
    with pytest.raises(ValueError, match="flags='odd' is not allowed"):
        index.search(Search(flags=["odd"]))


@pytest.mark.parametrize(("text", "expected"), [("WHERE IS 1", 6), ("%", 0), ("_", 0), ("'; DROP", 0), ("paris", None)])
def test_text_is_text(index: RunIndex, text: str, expected: int | None) -> None:
    total = index.search(Search(text=text))["total"]
    assert total == expected if expected is not None else total > 0


def test_it_follows_and_says_what_it_could_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    write_step(folder, 1, questions(1))
    index = RunIndex(Dump(tmp_path))
    index.refresh()
    revision = index.revision
    index.refresh()
    assert index.revision == revision
    write_step(folder, 2, questions(2))
    (folder / "3.jsonl").write_text('{"uid": "x"}\n')
    (folder / "4.jsonl").write_text('{"uid": ')
    index.refresh()
    state = index.state()
    assert state["steps"] == 2 and state["revision"] > revision
    assert len(state["problems"]) == 2 and "3.jsonl, line 1: step" in state["problems"][0]
    assert "4.jsonl: line 1 is not whole: it is being written, or cut" in state["problems"][1]
    # A run that was resumed writes a step again.
    write_step(folder, 2, questions(2, number=1))
    later = time.time_ns() + 10**9
    os.utime(folder / "2.jsonl", ns=(later, later))
    (folder / "3.jsonl").unlink()
    (folder / "4.jsonl").unlink()
    index.refresh()
    assert index.state()["problems"] == []
    assert index.search(Search(step_from=2))["total"] == 1
    assert index.curves()[2]["timing_s/step"] == 5.0


def test_a_file_that_is_cut_is_read_once_and_again_when_it_has_grown(tmp_path: Path) -> None:
    write_step(tmp_path, 1, questions(1))
    write_step(tmp_path, 2, questions(2))
    path = tmp_path / "2.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    index = RunIndex(Dump(tmp_path))
    index.refresh()
    assert index.state()["steps"] == 1 and len(index.state()["problems"]) == 1
    read: list[int] = []
    index.refresh(lambda done, total: read.append(total))
    assert read == []
    path.write_bytes(whole)
    index.refresh()
    assert index.state()["steps"] == 2 and index.state()["problems"] == []


def test_a_step_that_is_written_anew_is_never_mixed_with_the_one_before(tmp_path: Path) -> None:
    write_step(tmp_path, 1, questions(1))
    path = tmp_path / "1.jsonl"
    index = RunIndex(Dump(tmp_path))
    index.refresh()
    lines = lines_of(path)
    # Other rollouts at the same places, and at other places.
    path.write_text("".join(lines).replace("u-1-0", "u-1-9"))
    with pytest.raises(KeyError, match="no question u-1-0 in step 1"):
        index.rollouts(1, "u-1-0")
    path.write_text("".join(reversed(lines)))
    assert {rollout.group for rollout in index.rollouts(1, "u-1-1")} == {"u-1-1"}
    path.write_text("".join(lines)[:-5])
    with pytest.raises(DumpError):
        index.rollouts(1, "u-1-2")


def test_only_files_of_steps_are_read(tmp_path: Path) -> None:
    write_step(tmp_path, 1, questions(1))
    (tmp_path / "2.jsonl").mkdir()
    os.mkfifo(tmp_path / "3.jsonl")
    for name in ("05.jsonl", "9" * 30 + ".jsonl", "\u0663.jsonl", "6.jsonl.partial", "-7.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "8.jsonl").symlink_to(tmp_path / "nowhere")
    index = RunIndex(Dump(tmp_path))
    index.refresh()
    problems = index.state()["problems"]
    assert index.state()["steps"] == 1
    assert [problem.split("/")[-1] for problem in problems] == ["2.jsonl is no file", "3.jsonl is no file"]


def test_metrics_are_read_past_a_line_that_cannot_be_and_anew_in_another_file(tmp_path: Path) -> None:
    write_run(tmp_path, steps=2)
    path = tmp_path / "rollouts" / "steps.jsonl"
    lines = lines_of(path)
    path.write_text(lines[0] + '{"dump_version": 9, "step": 1, "metrics": {}}\n{"odd": 1}\n' + lines[1])
    index = RunIndex(Dump(tmp_path))
    index.refresh()
    assert [index.curves()[step]["timing_s/step"] for step in (1, 2)] == [4.0, 5.0]
    assert ["dump_version is 9" in index.state()["problems"][0], len(index.state()["problems"])] == [True, 2]
    path.write_text(lines[1])
    index.refresh()
    assert "timing_s/step" not in index.curves()[1] and index.state()["problems"] == []


def test_an_index_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_step(tmp_path, 1, questions(1))
    path = tmp_path / "elsewhere.sqlite"
    index = RunIndex(Dump(tmp_path), path)
    path.unlink()
    index.refresh()  # made anew
    assert index.state()["steps"] == 1 and path.is_file()
    write_step(tmp_path, 2, questions(2))
    path.unlink()
    path.mkdir()
    with pytest.raises(DumpError, match="cannot be written: unable to open"):
        index.refresh()


def test_a_training_that_begins_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    runs = Runs([tmp_path])
    runs.refresh()
    (state,) = runs.overview()["runs"]
    assert (state["name"], state["steps"], state["problems"]) == (tmp_path.name, 0, [])
    write_step(tmp_path / "rollouts", 1, questions(1))
    runs.refresh()
    (state,) = runs.overview()["runs"]
    assert (state["steps"], state["problems"]) == (1, [])
    assert (tmp_path / "rollouts" / INDEX_FILE).is_file()


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "run", steps=1) for place in ("x/one", "y/one", "two")]
    assert list(Runs(folders).indexes) == ["run", "one/run", "two/run"]
    assert list(Runs([folders[2], folders[0], folders[1] / "rollouts"]).indexes) == ["run", "one/run", "y/one/run"]
    with pytest.raises(DumpError, match="is given twice"):
        Runs([folders[0], folders[0] / "rollouts"])


def test_one_run_that_cannot_be_read_keeps_no_other_away(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, steps=1) for name in ("one", "two"))
    runs = Runs([one, two])
    runs.refresh()
    one.rename(tmp_path / "away")
    write_step(two / "rollouts", 2, questions(2))
    runs.refresh()
    states = {state["name"]: state for state in runs.overview()["runs"]}
    assert states["one"]["problems"] == [f"{one / 'rollouts'} is gone"] and states["one"]["steps"] == 1
    assert states["two"]["problems"] == [] and states["two"]["steps"] == 2
    (tmp_path / "away").rename(one)
    runs.refresh()
    assert not any(state["problems"] for state in runs.overview()["runs"])


def test_a_follower_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs([write_run(tmp_path / "run", steps=1)])

    def broken(show: Any = None) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(runs, "refresh", broken)
    with pytest.raises(ZeroDivisionError):
        runs.follow(0.01)
    assert runs.overview()["runs"][0]["problems"] == ["nothing more is read: see the log of the service"]


def test_a_game_asks_for_no_answer(tmp_path: Path) -> None:
    index = RunIndex(Dump(write_game(tmp_path / "game", steps=6)))
    index.refresh()
    found = index.search(Search(limit=500))["questions"]
    assert {(question["no_answer"], question["clusters"]) for question in found} == {(0, None)}
    curves = index.curves()
    assert all("siop/no_answer" not in values for values in curves.values())
    assert alarms(curves) == []


def test_curves_of_a_scorer_are_those_of_a_run_that_asks_one(tmp_path: Path) -> None:
    folders = [write_game(tmp_path / "game"), *(write_run(tmp_path / name, steps=2) for name in ("votes", "siop"))]
    logged = {"siop/seconds/busy": 0.5, "siop/seconds/cluster": 0.5, "siop/tokens/computed": 0.0}
    for step in (1, 2):
        dump.append_step(tmp_path / "votes" / "rollouts", step, logged)
        dump.append_step(tmp_path / "siop" / "rollouts", step, {**logged, "siop/tokens/computed": 5.0 * (step - 1)})
    runs = Runs(folders)
    runs.refresh()
    shown = {
        name: {metric for metric in runs.curves(name)["metrics"] if metric.startswith(("siop/seconds", "siop/tokens"))}
        for name in ("game", "votes", "siop")
    }
    seconds = {"siop/seconds/busy", "siop/seconds/cluster"}
    assert shown == {"game": set(), "votes": seconds, "siop": seconds | {"siop/tokens/computed"}}
    runs.close()


def test_an_index_that_cannot_lie_beside_the_dump_lies_in_the_cache_or_is_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_step(tmp_path, 1, questions(1))
    (tmp_path / INDEX_FILE).mkdir()
    (tmp_path / "file").touch()
    for cache, files in (("cache", 1), ("file", 0)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        index = RunIndex(Dump(tmp_path))
        index.refresh()
        assert index.search(Search())["total"] == 3
        assert len(list((tmp_path / cache).glob("siop-inspector/*.sqlite"))) == files
    assert "the index lasts for this time only" in caplog.text


def test_an_index_is_used_again_and_a_damaged_one_made_anew(run: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    first = RunIndex(Dump(folder))
    first.refresh()
    first.close()
    again = RunIndex(Dump(folder))
    assert again.state()["steps"] == 2
    again.close()
    (folder / "rollouts" / INDEX_FILE).write_bytes(b"no database" * 100)
    anew = RunIndex(Dump(folder))
    anew.refresh()
    assert anew.state()["steps"] == 2


def test_curves_are_those_of_the_logs_and_of_the_rollouts(index: RunIndex) -> None:
    curves = index.curves()
    rollouts = [rollout for _, rollout in index.dump.read(3)]
    assert curves[3]["siop/turns/mean"] == pytest.approx(sum(len(r.turns) for r in rollouts) / len(rollouts))
    assert curves[3]["siop/outcome/em"] == pytest.approx(sum(r.em or 0 for r in rollouts) / len(rollouts))
    assert curves[3]["timing_s/step"] == 6.0
    assert "siop/turn_reward/turn_2/mean" in curves[3]
