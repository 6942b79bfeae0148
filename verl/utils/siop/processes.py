"""What this process has started, and what that has started: found to the last one, and ended."""

from __future__ import annotations

import ctypes
import signal
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Have what outlives its parent become a child of this process, so that :func:`end_started` finds it.

    Ray's workers outlive their raylet, and one that was just starting notices only after minutes that it is alone.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_started(patience: float = 5.0) -> None:
    """End all children, and theirs: SIGTERM, and SIGKILL to what is left after ``patience`` seconds."""
    started = psutil.Process().children(recursive=True)
    for process in started:
        _signal(process, signal.SIGTERM)
    psutil.wait_procs(started, timeout=patience)
    # Again and again: a look around while parents die misses some of their children, which come to be ours.
    end = time.monotonic() + patience
    left = psutil.Process().children(recursive=True)
    while left and time.monotonic() < end:
        for process in left:
            _signal(process, signal.SIGKILL)
        _, dying = psutil.wait_procs(left, timeout=0.5)
        left = psutil.Process().children(recursive=True) or dying


def _signal(process: psutil.Process, signum: signal.Signals) -> None:
    try:
        process.send_signal(signum)
    except psutil.NoSuchProcess:
        return
