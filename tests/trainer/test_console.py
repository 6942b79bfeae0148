"""What people see of a run: a real training of two steps, errors, and the parts."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scorer_process import ROOT
from toy_training import ToyTraining, small_world
from verl.trainer.siop.run import counting
from verl.trainer.siop.run.console import Console
from verl.trainer.siop.run.counting import Due, QuestionCounter
from verl.trainer.siop.run.log_warnings import LogWarnings, Once
from verl.trainer.siop.run.progress import Progress, step_numbers, validation_numbers
from verl.utils.siop.errors import SiopConfigError

from benchmarks.toy_services import toy_services

STEP = {"training/global_step": 1.0, "timing_s/step": 12.34, "critic/score/mean": 0.25}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("world") / "toy")


def test_two_steps_with_wandb_offline_fit_on_a_screen(world: Path, tmp_path: Path) -> None:
    with toy_services(world, tmp_path / "services") as env:
        run = ToyTraining(
            world,
            tmp_path,
            "algorithm.siop_on_nothing_learnt=warn",
            "data.max_response_length=64",
            "trainer.total_training_steps=2",
            "trainer.test_freq=2",
            "trainer.logger=[tensorboard,wandb]",  # without console, which is not needed
            env={**env, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TENSORBOARD_DIR": str(tmp_path / "tb")},
        )
        try:
            assert run.wait(300) == 0, run.report()
        finally:
            run.kill()
    printed, log = run.printed, run.log.read_text()
    assert len(printed) < 60
    for label in ("model", "data", "output", "device", "log", "stop"):
        assert any(re.match(rf"{label} +\S", line) for line in printed), printed
    assert f"log      {run.log}" in printed and "training, 2 steps" in printed
    numbers = r"EM 0\.\d{3}  F1 0\.\d{3}  turns \d\.\d\d  no answer [01]\.\d\d  \d+\.\d s  \d\d:\d\d left"
    assert [line[:8] for line in printed if re.fullmatch(rf"step [12]/2  {numbers}", line)] == ["step 1/2", "step 2/2"]
    assert any(re.fullmatch(r"validation after step 2  EM \d\.\d{3}  F1 .*turns \d\.\d\d", line) for line in printed)
    assert re.fullmatch(rf"done in \d\d:\d\d; checkpoint {run.out}/global_step_2", printed[-1])
    # The alarm about a policy that has learnt nothing, with its own lines, once.
    alarms = [place for place, line in enumerate(printed) if line.startswith("warning: nothing can be learnt")]
    assert len(alarms) == 1 and printed[alarms[0] + 1].startswith("  ")
    # All else is in the log: the configuration, and what the workers said.
    assert "'adv_estimator': 'siop'" in log and "SiopTaskRunner pid=" in log
    assert not any("pid=" in line for line in printed)
    # The loggers have ended in order.
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) and list((tmp_path / "tb").glob("events.*"))
    assert "Traceback" not in log


def test_an_error_is_told_in_one_line_with_the_log(world: Path, tmp_path: Path) -> None:
    run = ToyTraining(world, tmp_path, f"data.train_files={tmp_path / 'nowhere.parquet'}")
    assert run.wait(120) == 1, run.report()
    assert run.printed[-2].startswith("error: ") and "nowhere.parquet" in run.printed[-2]
    assert run.printed[-1] == f"log: {run.log}"
    assert not any("Traceback" in line for line in run.printed)


def test_what_hydra_says_about_the_command_is_not_hidden(world: Path, tmp_path: Path) -> None:
    run = ToyTraining(world, tmp_path, "trainer.total_training_step=2")
    assert run.wait(120) == 1
    assert any("total_training_step" in line for line in run.printed), run.printed


@pytest.mark.parametrize(
    ("mode", "log", "message"),
    [("everybody", "x", "SIOP_CONSOLE=everybody is not allowed"), ("people", "", "needs SIOP_LOG")],
)
def test_variables_of_the_console(mode: str, log: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIOP_CONSOLE", mode)
    monkeypatch.setenv("SIOP_LOG", log)
    with pytest.raises(SiopConfigError, match=message):
        Console.from_environment()


SHOW = """
import logging, os, sys
from pathlib import Path
from verl.trainer.siop.run.console import Console
from verl.trainer.siop.run.progress import Progress
progress = Progress(folder=Path("out"))
progress.update({"kind": "train", "step": 0, "total": 4})
with Console(Path(sys.argv[1])) as console:
    for step in (1, 2):
        values = {"training/global_step": float(step), "timing_s/step": 5.0}
        progress.update({"kind": "metrics", "step": step, "values": values})
        console.step(progress, f"EM .{step}")
        print("noise of a library")
        os.system("echo noise of a process")
    logging.getLogger("x").warning("mind the gap")
    logging.getLogger("x").warning("mind the gap")
    console.error("all is lost")
"""


def test_on_a_terminal_the_steps_are_a_bar(tmp_path: Path) -> None:
    text = on_a_terminal(SHOW, tmp_path / "log")
    assert re.search(r"step 2/4 .*EM \.2, \d\d:\d\d left", text), text
    assert text.count("warning: mind the gap") == 1
    assert f"error: all is lost\r\nlog: {tmp_path / 'log'}\r\n" in text
    assert "noise" not in text
    log = (tmp_path / "log").read_text()
    assert log.count("noise of a library") == log.count("noise of a process") == 2


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # how a terminal says that nobody writes any more
        return b""


def on_a_terminal(code: str, log: Path) -> str:
    """What a program shows on a terminal of 100 columns."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    done = subprocess.Popen([sys.executable, "-c", code, str(log)], cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while chunk := _read(mine):
        shown += chunk
    assert done.wait(60) == 0, shown
    return shown.decode()


COUNT = SHOW.replace(
    """    logging.getLogger("x").warning""",
    """    for done in (0, 30, 120):
        progress.update({"kind": "questions", "done": done, "total": 120, "seconds": done / 2})
        console.questions(progress)
    logging.getLogger("x").warning""",
    1,
)


def test_on_a_terminal_the_questions_of_a_validation_are_a_bar(tmp_path: Path) -> None:
    text = on_a_terminal(COUNT, tmp_path / "log")
    assert re.search(r"30 of 120 questions, about 00:45 left ", text), text
    assert "120 of 120 questions " in text and "0 of 120 questions " in text
    assert "step 2/4" in text


def test_elsewhere_they_are_lines_now_and_then(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(tmp_path / "log")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    counted = [line for line in done.stdout.splitlines() if "questions" in line]
    assert counted == ["0 of 120 questions", "30 of 120 questions, about 00:45 left", "120 of 120 questions"]
    due = Due()
    assert [seconds for seconds in range(0, 4000, 2) if due(seconds)][:3] == [10, 20, 30]
    assert sum(due(seconds) for seconds in range(4000, 8000)) < 20


def test_the_trainer_tells_how_many_questions_are_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, sent = [100.0], list[tuple[int, float]]()
    monkeypatch.setattr(counting.time, "monotonic", lambda: now[0])
    channel: Any = SimpleNamespace(put=lambda kind, done, total, seconds: sent.append((done, seconds)))
    count = QuestionCounter(50, channel)
    for second, done in ((0.0, 0), (0.1, 0), (0.5, 2), (11.0, 5), (12.0, 5), (12.5, 10), (12.6, 50), (12.7, 50)):
        now[0] = 100.0 + second
        count(done)
    assert sent == [(0, 0.0), (5, 11.0), (10, 12.5), (50, pytest.approx(12.6))]
    lines = ["validation: 5 of 50 questions, about 01:39 left", "validation: 50 of 50 questions"]
    assert [record.message for record in caplog.records] == lines


def test_a_run_goes_on_when_nobody_looks_any_more(tmp_path: Path) -> None:
    code = SHOW + "print('to the end')"
    shell = f'"$0" -c "$1" {tmp_path / "log"} | head -n 0; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell, sys.executable, code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to the end" in (tmp_path / "log").read_text()


# --- the lines of a run -----------------------------------------------------------------------------------------------


def run_of(*records: dict[str, Any], **options: Any) -> Progress:
    progress = Progress(folder=Path("out"), **options)
    for record in records:
        progress.update(record)
    return progress


def step(number: int, seconds: float) -> dict[str, Any]:
    return {"kind": "metrics", "step": number, "values": {"training/global_step": 1.0, "timing_s/step": seconds}}


def test_the_numbers_of_a_step() -> None:
    assert step_numbers(STEP) == "reward 0.250  12.3 s"
    labels = {"siop/outcome/em": 0.5, "siop/outcome/f1": 0.625, "siop/turns/mean": 2.0, "siop/no_answer": 0.0}
    assert step_numbers({**STEP, **labels}) == "EM 0.500  F1 0.625  turns 2.00  no answer 0.00  12.3 s"


def test_the_numbers_of_a_validation() -> None:
    assert validation_numbers(STEP) == ""
    values = {"val-core/average/em/mean@1": 0.5, "val-core/nq/em/mean@1": 0.4, "val-core/average/f1/mean@1": 0.6}
    assert validation_numbers({**STEP, **values, "val-aux/turns/mean": 3.0}) == "EM 0.500  F1 0.600  turns 3.00"
    assert validation_numbers({"val-aux/other/mean": 1.0}) == "no labels"


def test_time_left_is_that_of_the_last_ten_steps() -> None:
    train = {"kind": "train", "step": 0, "total": 31}
    progress = run_of(train, step(1, 1000.0), *(step(number, 6.0) for number in range(2, 12)))
    assert progress.time_left() == "02:00"


def test_the_step_in_progress() -> None:
    train, began = {"kind": "train", "step": 0, "total": 9}, {"kind": "step", "step": 2}
    assert run_of().seconds_until_saved() is None
    assert run_of(train, began).seconds_until_saved() == 0
    progress = run_of(train, step(1, 5.0), began)
    time.sleep(0.1)
    left = progress.seconds_until_saved()
    assert left is not None and 0 < left <= 4.9
    progress.update(step(2, 5.0))  # a validation, perhaps
    assert progress.seconds_until_saved() == 0


@pytest.mark.parametrize(
    ("options", "start", "saved", "told"),
    [
        ({}, 0, None, "at step 0; there is no checkpoint: the same command starts from the beginning"),
        ({}, 0, 1, "at step 0; the last checkpoint is out/global_step_1; the same command goes on from there"),
        ({}, 20, None, "at step 20; the last checkpoint is out/global_step_20; the same command goes on from there"),
        (
            {"resume_mode": "disable"},
            0,
            3,
            "at step 0; the last checkpoint is out/global_step_3; trainer.resume_mode=auto goes on from there",
        ),
        (
            {"resume_mode": "resume_path", "resume_path": "a/global_step_7"},
            7,
            None,
            "at step 7; the last checkpoint is a/global_step_7; the same command goes on from there",
        ),
        (
            {"resume_mode": "resume_path", "resume_path": "a/global_step_7"},
            7,
            8,
            "at step 7; the last checkpoint is out/global_step_8; trainer.resume_mode=auto goes on from there",
        ),
    ],
)
def test_where_a_stopped_run_goes_on(options: dict[str, str], start: int, saved: int | None, told: str) -> None:
    progress = run_of({"kind": "train", "step": start, "total": 30}, **options)
    assert (f"training goes on from {progress.checkpoint}, " if start else "training, 30 steps") in progress.started()
    if saved:
        progress.update({"kind": "saved", "step": saved})
    assert progress.stopped("SIGINT") == f"stopped by SIGINT {told}"


def test_a_stopped_evaluation_says_how_far_it_came() -> None:
    progress = run_of(evaluates=True)
    assert progress.stopped("SIGINT").startswith("the evaluation was stopped by SIGINT after 0 of all questions")
    progress.update({"kind": "questions", "done": 12, "total": 420, "seconds": 5.0})
    assert progress.stopped("SIGINT") == (
        "the evaluation was stopped by SIGINT after 12 of 420 questions; it has no results"
    )


def test_a_run_whose_steps_are_all_done_is_known_by_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "global_step_4").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4\n")

    def is_complete(steps: int | None, **options: Any) -> bool:
        return Progress(folder=tmp_path, **options).is_complete(steps)

    assert is_complete(4) and is_complete(3) and not is_complete(5) and not is_complete(None)
    assert not is_complete(4, resume_mode="disable")
    named = str(tmp_path / "global_step_4")
    assert is_complete(4, resume_mode="resume_path", resume_path=named)
    assert not is_complete(4, resume_mode="resume_path", resume_path=f"{tmp_path}/global_step_5")
    progress = Progress(folder=tmp_path)
    assert progress.is_complete(4) and progress.started().startswith(f"all 4 steps are done, in {named}: ")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")  # its folder is gone
    assert not is_complete(4)


def test_a_complete_run_says_so_before_it_loads_a_model(world: Path, tmp_path: Path) -> None:
    run_of_4 = tmp_path / "out"
    (run_of_4 / "global_step_4").mkdir(parents=True)
    (run_of_4 / "latest_checkpointed_iteration.txt").write_text("4")
    # 32 questions, 8 a step.
    run = ToyTraining(world, tmp_path, "ablation=grpo", "trainer.total_epochs=1")
    assert run.wait(120) == 0, run.report()
    assert run.printed[-2].startswith(f"all 4 steps are done, in {run_of_4}/global_step_4: more come of"), run.report()
    assert not any("loading the models" in line for line in run.printed)


# --- warnings in the log ----------------------------------------------------------------------------------------------

RAY = "\x1b[36m(Worker pid=17)\x1b[0m "


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/a/b.py:12: FutureWarning: it goes", "it goes"),
        (RAY + "WARNING:2026-11-26 07:08:17,382:it is slow", "it is slow"),
        (RAY + "2026-11-26 07:08:17,382 - WARNING - some.where - it is slow", "it is slow"),
        ("2026-11-26 07:07:34,009\tWARNING setup.py:85 -- it is slow", "it is slow"),
        (RAY + "WARNING 11-26 07:08:17 [config.py:85] it is slow", "it is slow"),
        ("(raylet pid=1, ip=10.0.0.1) ERROR: it died", "it died"),
        (RAY + "Loading: 10%\rLoading: 99%\rWARNING:2026-11-26 07:08:17,382:late", "late"),
        (RAY + "INFO:2026-11-26 07:08:17,382:WARNING is a word", None),
        ("'NCCL_DEBUG': 'WARNING',", None),
        ("    siop_on_scorer_error: ERROR", None),
    ],
)
def test_what_is_a_warning(line: str, message: str | None, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"WARNING: of an earlier run\n{line}\n")
    warnings = LogWarnings(log, len("WARNING: of an earlier run\n"))
    assert warnings.rest() == ([message] if message else [])


def test_the_lines_of_a_block_stay_together(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    warnings = LogWarnings(log, 0)

    def append(text: str) -> list[str]:
        with open(log, "a") as file:
            file.write(text)
        return warnings.new()

    other = RAY.replace("17", "18")
    assert append(f"{RAY}WARNING:2026-11-26 07:08:17,382:nothing learnt\n{RAY}  one\n{other}  not mine\n{RAY}  t") == []
    assert append("wo\n") == []
    assert append("") == ["nothing learnt\n  one\n  two"]
    assert append(f"{RAY}WARNING:2026-11-26 07:08:17,382:again\n{RAY}something else\n{RAY}  not its\n") == ["again"]
    assert append("/a/b.py:12: UserWarning: mind\n  warnings.warn('mind')\n") == ["mind"]


def test_each_warning_is_new_once() -> None:
    once = Once()
    assert once.is_new("3 of 8 questions dropped") and not once.is_new("5 of 8 questions dropped")
    assert once.is_new("3 of 8 rollouts dropped")
    assert not once.is_new("megatron engine is not available: ModuleNotFoundError(\"No module named 'megatron'\")")
