"""Real scoring services, started directly or by the launcher, with a port and an environment for them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port that nobody listens on.

    Below those that the system gives to connections: one of them may be taken again before a slow start binds it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def eventually(condition, timeout_s: float = 60.0):
    """Poll until ``condition()`` is true; returns its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still not so after {timeout_s} s"
        time.sleep(0.02)
    return value


def scorer_env(**extra: str) -> dict[str, str]:
    """Environment of a scorer process: as the launcher has it, but one thread, no outer Ray, no proxy."""
    env = {
        k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "SIOP_API_TOKEN") and "proxy" not in k.lower()
    }
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "VERL_USE_EXTERNAL_PLUGINS": "none"}
    return {**env, **own, **extra}


class ScorerProcess:
    """A real scoring server in its own session.

    Args:
        arguments: command line after ``python -m verl.utils.siop.scoring_server``; ``--port`` is added.
        log: file for its output.
        env: added to :func:`scorer_env`.
        port: default: a free one.
    """

    def __init__(
        self, arguments: list[str], log: Path, env: dict[str, str] | None = None, port: int | None = None
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "verl.utils.siop.scoring_server", "--threads", "1", *arguments]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                cwd=ROOT,
                env=scorer_env(**(env or {})),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_healthy(self, timeout_s: float = 180.0) -> dict:
        """Wait for 200 from /health and return its JSON."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the scorer exited with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                response = httpx.get(f"{self.url}/health", timeout=5)
            except httpx.TransportError:
                response = None
            if response is not None and response.status_code == 200:
                return response.json()
            time.sleep(0.1)
        raise AssertionError(f"the scorer was not healthy after {timeout_s} s:\n{self.log.read_text()}")

    def members(self) -> list[int]:
        """Living processes of the server's session, the server among them."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def worker_pids(self, kind: str = "Scoring") -> list[int]:
        """Processes that hold the models of this kind, ``Scoring`` or ``Nli``."""
        pids = []
        for pid in self.members():
            with contextlib.suppress(OSError):
                if f"ray::{kind}Worker" in Path(f"/proc/{pid}/cmdline").read_text():
                    pids.append(pid)
        return pids

    def stop(self) -> int:
        """SIGTERM the server, assert that its whole session ends, and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(60)
            left = self.members()
        finally:
            self.kill()
        assert not left, f"processes were left running: {left}"
        return code

    def kill(self) -> None:
        """SIGKILL the server and whatever is left of its session."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


def launcher(log_dir: Path, port: int, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``launch_siop_scorer.sh`` with this interpreter's environment, to its end.

    Args:
        log_dir: its LOG_DIR, and the folder to run in.
        port: its SIOP_PORT.
        arguments: its command line.
        env: added to :func:`scorer_env`.
    """
    python = Path(sys.executable)
    full = scorer_env(
        LOG_DIR=str(log_dir), SIOP_PORT=str(port), SIOP_NUM_GPUS="0", VIRTUAL_ENV=str(python.parent.parent), **env
    )
    full["PATH"] = f"{python.parent}:{full['PATH']}"
    full.pop("CONDA_ENV", None)
    return subprocess.run(
        ["bash", str(ROOT / "launch_siop_scorer.sh"), *arguments],
        env=full,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=log_dir,
    )
