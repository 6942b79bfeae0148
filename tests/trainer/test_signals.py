"""How a training ends before its last step: real trainings and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from toy_training import ROOT, ToyTraining, small_world
from verl.trainer.siop.run.progress import Progress
from verl.trainer.siop.run.stopping import StopSignals, grace_seconds
from verl.trainer.siop.run.supervised import SupervisedTrainer
from verl.utils.siop.errors import SiopConfigError

# With labels, and without a scorer; the policy has nothing to learn, and need not. No validation.
OVERRIDES = (
    "ablation=grpo",
    "algorithm.siop_on_nothing_learnt=warn",
    "trainer.logger=[]",
    "trainer.total_training_steps=1000",
    "trainer.save_freq=1000",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("world") / "toy")


@contextmanager
def training(world: Path, folder: Path, grace: float, *overrides: str) -> Iterator[ToyTraining]:
    run = ToyTraining(world, folder, *OVERRIDES, *overrides, env={"SIOP_STOP_GRACE_S": str(grace)})
    try:
        yield run
    finally:
        run.kill()


def test_sigterm_ends_after_the_step_with_a_checkpoint(world: Path, tmp_path: Path) -> None:
    with training(world, tmp_path, 300) as run:
        run.wait_for("the checks have passed")
        # Meanwhile, nobody else gets in.
        (tmp_path / "second").mkdir()
        with training(world, tmp_path / "second", 300, f"trainer.default_local_dir={run.out}") as second:
            assert second.wait(120) == 1, second.report()
        (error,) = [line for line in second.printed if line.startswith("error: ")]
        assert f"trainer.default_local_dir={run.out}" in error
        assert f"process {run.process.pid} on {os.uname().nodename} since 2" in error and str(run.log) in error
        assert "Traceback" not in second.report()

        run.wait_for(r"step 1/1000 .* s ")
        run.process.terminate()
        assert run.wait(120) == 128 + signal.SIGTERM, run.report()
        step = int((run.out / "latest_checkpointed_iteration.txt").read_text())
        assert step in (2, 3), run.report()
        assert (run.out / f"global_step_{step}" / "actor" / "huggingface" / "config.json").is_file()
        checkpoint = run.out / f"global_step_{step}"
        expected = f"at step {step}; the last checkpoint is {checkpoint}; the same command goes on from there"
        assert run.printed[-1] == f"stopped by SIGTERM {expected}"
        assert run.nothing_is_left(), run.alive()
        assert "Traceback" not in run.report()


def test_a_second_ctrl_c_ends_at_once(world: Path, tmp_path: Path) -> None:
    with training(world, tmp_path, 300, "actor_rollout_ref.rollout.n=64") as run:
        run.wait_for(r"training, 1000 steps")
        for expected in ("stopping: ", "stopped by SIGINT"):
            os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
            run.wait_for(expected)
        assert run.wait(60) == 128 + signal.SIGINT, run.report()
        assert run.printed[-1] == (
            "stopped by SIGINT at step 0; there is no checkpoint: the same command starts from the beginning"
        )
        assert run.nothing_is_left(), run.alive()
        assert not list(run.out.glob("global_step_*"))


def test_sigterm_to_ray_too_ends_in_order(world: Path, tmp_path: Path) -> None:
    with training(world, tmp_path, 300) as run:
        run.wait_for(r"training, 1000 steps")
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM, run.report()
        assert run.printed[-1].startswith("stopped by SIGTERM at step 0; there is no checkpoint"), run.report()
        assert run.nothing_is_left(), run.alive()


def test_a_signal_before_the_first_step_ends_at_once(world: Path, tmp_path: Path) -> None:
    with training(world, tmp_path, 300) as run:
        run.wait_for("the checks have passed")
        while not any("raylet" in process.name() for process in run.alive()):
            time.sleep(0.05)
        run.process.terminate()
        assert run.wait(60) == 128 + signal.SIGTERM, run.report()
        assert run.printed[-1] == "stopped by SIGTERM before the first step"
        assert run.nothing_is_left(), run.alive()


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    """With 10 s of grace, on a training whose steps take 8 s."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    progress = Progress(folder=Path("out"))
    progress.update({"kind": "train", "step": 0, "total": 4})
    progress.update({"kind": "metrics", "step": 1, "values": {"training/global_step": 1.0, "timing_s/step": 8.0}})
    progress.update({"kind": "step", "step": 2})
    found = StopSignals(10, progress)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found.install()
    yield found
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_the_first_signal_leaves_time_for_the_step(signals: StopSignals) -> None:
    assert not signals.run_is_over() and signals.deadline is None
    signal.raise_signal(signal.SIGINT)
    assert not signals.run_is_over() and signals.deadline is not None
    assert 9 < signals.deadline - time.monotonic() <= 10
    signals.deadline -= 10
    assert signals.run_is_over()


def test_any_second_signal_leaves_none(signals: StopSignals) -> None:
    signal.raise_signal(signal.SIGINT)
    assert not signals.run_is_over()
    signal.raise_signal(signal.SIGTERM)
    assert signals.run_is_over() and signals.signum == signal.SIGINT


def test_a_step_that_takes_longer_than_the_grace_is_not_waited_for(signals: StopSignals) -> None:
    signals.grace = 7
    signal.raise_signal(signal.SIGTERM)
    assert signals.run_is_over() and signals.deadline is None


def test_what_nohup_ignores_stays_ignored(signals: StopSignals) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.install()
    signal.raise_signal(signal.SIGINT)
    assert signals.signum is None


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan", ""])
def test_a_grace_period_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIOP_STOP_GRACE_S", text)
    with pytest.raises(SiopConfigError, match=f"SIOP_STOP_GRACE_S={text} is not allowed: seconds, 0 or more"):
        grace_seconds()


class Recorder:
    """The trainer's end of a channel that asks it to stop."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def put(self, kind: str, **values: object) -> None:
        self.kinds.append(kind)

    def stop_asked(self) -> bool:
        return True


@pytest.mark.parametrize(("save_freq", "saved_at", "saves"), [(10, 3, True), (10, 5, False), (-1, 3, False)])
def test_a_stop_during_a_validation_saves_what_is_not_saved(
    save_freq: int, saved_at: int, saves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(
        "verl.trainer.ppo.v1.trainer_base.PPOTrainer._save_checkpoint", lambda self: done.append("save")
    )
    trainer = object.__new__(SupervisedTrainer)
    trainer._channel = Recorder()  # type: ignore[assignment]
    trainer.config = OmegaConf.create({"trainer": {"save_freq": save_freq, "test_freq": 5}})
    trainer.checkpoint_manager = SimpleNamespace(sleep_replicas=lambda: done.append("sleep"))  # type: ignore[assignment]
    trainer.global_steps, trainer.total_training_steps = 5, 100
    trainer.on_validate_end()  # before the training loop: there is nothing to save
    assert done == [] and trainer.total_training_steps == 100
    trainer._saved = saved_at
    trainer.on_validate_end()
    assert done == ["sleep", "save"][: 1 + saves]
    assert trainer.total_training_steps == 5 and trainer.config.trainer.test_freq == -1


def _catches(pid: int, signum: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (signum - 1) & 1)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("seconds", [0, 2])
def test_a_signal_while_the_trainer_imports_is_one_line(seconds: float, signum: signal.Signals) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "run_module.py"), "verl.trainer.siop.main", "hardware=cpu"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Ignored in the background of a shell.
        preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)],
    )
    while not _catches(process.pid, signal.SIGTERM):
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, errors
    assert errors.splitlines()[-1] == f"stopped by {signum.name} before it had started" and "Traceback" not in errors
