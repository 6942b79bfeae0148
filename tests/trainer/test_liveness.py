"""A process that generates and dies: noticed at once, named, and no reason to wait for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from toy_training import ToyTraining, small_world
from verl.trainer.siop.run.liveness import Liveness


@pytest.fixture
def workers() -> Iterator[list[Any]]:
    class Worker:  # (here, so that Ray sends it whole)
        async def pid(self) -> int:
            return os.getpid()

        async def work(self, seconds: float) -> None:
            time.sleep(seconds)  # and nobody else gets a turn

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield [ray.remote(num_cpus=0)(Worker).remote() for _ in range(2)]
    ray.shutdown()


def test_only_a_dead_worker_is_one(workers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.trainer.siop.run.liveness._PERIOD_S", 0.05)
    pids = ray.get([worker.pid.remote() for worker in workers])
    liveness = Liveness(workers)
    busy = workers[0].work.remote(2.0)
    for _ in range(10):
        assert liveness.died() is None
        time.sleep(0.05)
    ray.get(busy)
    os.kill(pids[1], signal.SIGKILL)
    end = time.monotonic() + 60
    while (said := liveness.died()) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "Worker" in said and "\n" not in said and "common causes" not in said


@pytest.mark.parametrize(
    ("victim", "said"),
    [
        ("AgentLoopWorkerTQ", "a process that generates rollouts has died"),
        ("SimpleStorageUnit", "a process of TransferQueue, which holds the rollouts, has died"),
        ("TransferQueueController", "a process of TransferQueue, which holds the rollouts, has died"),
    ],
)
def test_a_training_that_loses_a_process_ends_and_says_so(tmp_path: Path, victim: str, said: str) -> None:
    world = small_world(tmp_path / "world")
    overrides = ("ablation=grpo", "algorithm.siop_on_nothing_learnt=warn", "trainer.total_training_steps=1000")
    training = ToyTraining(world, tmp_path, *overrides, "trainer.save_freq=1", "trainer.val_before_train=false")
    try:
        training.wait_for("step 1/1000 ")
        killed = 0
        while not killed:
            for process in training.alive():
                if victim in " ".join(process.cmdline()):
                    process.kill()
                    killed += 1
        assert training.wait(120) == 1, training.report()
        (error,) = [line for line in training.printed if line.startswith("error: ")]
        assert said in error or victim in error, error
        assert training.nothing_is_left(30), training.alive()
        assert (training.out / "latest_checkpointed_iteration.txt").is_file()
    finally:
        training.kill()
