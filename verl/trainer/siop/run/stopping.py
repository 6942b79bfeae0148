"""SIGINT, SIGTERM and SIGHUP: how a run ends before its last step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import psutil
import ray
from verl.trainer.siop.run.progress import Progress
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.processes import adopt_orphans, end_started

GRACE_VARIABLE = "SIOP_STOP_GRACE_S"
# What a private Ray cannot be without.
_RAY_DAEMONS = ("gcs_server", "raylet")


def grace_seconds() -> float:
    """``SIOP_STOP_GRACE_S``: how long a run that was asked to stop may go on in order to save its step (30).

    Raises:
        SiopConfigError: not a number of seconds.
    """
    text = os.environ.get(GRACE_VARIABLE, "30")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise SiopConfigError(f"{GRACE_VARIABLE}={text} is not allowed: seconds, 0 or more")
    return value


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP; when the run has to end is for the main thread to ask.

    The first signal leaves time for the step in progress, if that may end within ``grace`` seconds; a second one none.
    """

    def __init__(self, grace: float, progress: Progress) -> None:
        self.grace, self._progress = grace, progress
        # The first signal; None as long as there was none.
        self.signum: signal.Signals | None = None
        # Until when the trainer is given time to stop by itself; None as long as it is not.
        self.deadline: float | None = None
        self._again = False

    def install(self) -> None:
        """From the main thread, again and again: Ray takes SIGTERM for itself in the middle of its start, and aborts.

        What is ignored (nohup) stays ignored.
        """
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._received)

    def _received(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signal.Signals(signum)
        else:
            self._again = True

    def run_is_over(self) -> bool:
        """Whether the run has to end now, whatever it does."""
        if self.signum is None:
            return False
        if self.deadline is None:
            wait = self._progress.seconds_until_saved()
            if wait is None or wait >= self.grace:
                return True
            self.deadline = time.monotonic() + self.grace
        return self._again or time.monotonic() >= self.deadline


class StartedProcesses:
    """What this process starts, and what that starts: a private Ray with its workers."""

    def __init__(self) -> None:
        adopt_orphans()
        self._daemons: dict[str, psutil.Process] = {}

    def ray_is_up(self) -> None:
        """To be called when Ray was started or joined."""
        children = {child.name(): child for child in psutil.Process().children()}
        self._daemons = {name: children[name] for name in _RAY_DAEMONS if name in children}

    def dead_daemon(self) -> str | None:
        """Name of a process that the private Ray cannot be without, and is."""
        for name, daemon in self._daemons.items():
            if not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE:
                return name
        return None

    def end(self, patience: float = 5.0) -> None:
        """End them all, by force after ``patience`` seconds; in a cluster that was joined, leave."""
        if ray.is_initialized() and not self._daemons:
            ray.shutdown()
        end_started(patience)
