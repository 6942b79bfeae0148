"""A short training on a tiny toy world, as its user starts it, and what is left of it when it has ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from fake_retriever import FakeRetriever
from scorer_process import ROOT

from benchmarks.marked import marked
from examples.toy_world import build


def small_world(folder: Path) -> Path:
    """A toy world whose policy has learnt nothing: it writes until its tokens are used up, and never searches."""
    steps = ["--copying-steps", "1", "--imperfect-steps", "1", "--threads", "1"]
    assert build.main(["--out", str(folder), "--train-questions", "32", "--eval-questions", "8", *steps]) == 0
    return folder


class ToyTraining:
    """``verl.trainer.siop.main`` with a console for people, in a session of its own. Its retriever, if ``env`` names
    none, is a :class:`FakeRetriever`.

    Args:
        world: of :func:`small_world`.
        folder: takes the output folder ``out`` and the log ``log``.
        overrides: added to those of the toy world.
        env: added to the environment.
        within: a command that runs it.
    """

    def __init__(
        self,
        world: Path,
        folder: Path,
        *overrides: str,
        env: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> None:
        self.out, self.log, self._mark = folder / "out", folder / "log", uuid.uuid4().hex
        command = [*within, sys.executable, "-u", "-m", "verl.trainer.siop.main", "--config-dir", str(ROOT / "config")]
        command += [
            "experiment=toy",
            "hardware=cpu",
            f"actor_rollout_ref.model.path={world / 'model'}",
            f"data.train_files={world / 'train.parquet'}",
            f"data.val_files={world / 'eval.parquet'}",
            f"actor_rollout_ref.rollout.multi_turn.tool_config_path={world / 'tool_config.yaml'}",
            f"trainer.default_local_dir={self.out}",
            *overrides,
        ]
        self._retriever = FakeRetriever()
        own = {
            "RETRIEVER_URL": self._retriever.url,
            "SIOP_CONSOLE": "people",
            "SIOP_LOG": str(self.log),
            "SIOP_TEST_MARK": self._mark,
        }
        unset = ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "SIOP_STOP_GRACE_S", "TENSORBOARD_DIR")
        outer = {name: value for name, value in os.environ.items() if name not in unset}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**outer, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", **own, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Ignored in the background of a shell, and then in what is started there.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.printed: list[str] = []

    def wait_for(self, pattern: str) -> None:
        """Read what is printed up to a line with ``pattern``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return
        raise AssertionError(f"the training ended before {pattern!r}:\n{self.report()}")

    def wait(self, timeout_s: float) -> int:
        """Its exit status, when it has printed everything."""
        rest, _ = self.process.communicate(timeout=timeout_s)
        self.printed += rest.splitlines()
        return self.process.returncode

    def report(self) -> str:
        log = self.log.read_text(errors="replace")[-5000:] if self.log.is_file() else ""
        return "\n".join([*self.printed, "--- log", log])

    def alive(self) -> list[psutil.Process]:
        return marked("SIOP_TEST_MARK", self._mark)

    def nothing_is_left(self, timeout_s: float = 5.0) -> bool:
        end = time.monotonic() + timeout_s
        while left := self.alive():
            if time.monotonic() > end:
                return False
            psutil.wait_procs(left, timeout=0.2)
        return True

    def kill(self) -> None:
        """End what a failed test has left."""
        for process in self.alive():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(10)
        self._retriever.close()
