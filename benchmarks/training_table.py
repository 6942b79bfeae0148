"""What the tables of trainings share: names of runs, their processes, and results of runs that are gone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_STOP_SECONDS = 10.0


def chosen(text: str, known: Iterable[str], option: str) -> list[str]:
    """Names from a comma-separated option.

    Raises:
        SystemExit: an unknown name.
    """
    allowed = list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in allowed]
    if wrong or not names:
        sys.exit(f"error: {option} {text}: choose from {', '.join(allowed)}")
    return names


def split_name(text: str, places: Iterable[str], methods: Iterable[str], form: str) -> tuple[str, str, int]:
    """Place, method and seed of a run's name; ``form`` says what a name looks like.

    Raises:
        SystemExit: no such name.
    """
    parts = re.fullmatch(r"([\w-]+)/([\w-]+)-seed(\d+)", text)
    if not parts:
        sys.exit(f"error: --only {text}: {form}")
    (place,), (method,) = chosen(parts[1], places, "--only"), chosen(parts[2], methods, "--only")
    return place, method, int(parts[3])


def start_run(command: Sequence[str], env: Mapping[str, str], logs: Path, cwd: Path) -> subprocess.Popen[bytes]:
    """Starts a run in a process group of its own; its output goes to ``run.log``."""
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "run.log").open("wb") as output:
        return subprocess.Popen(
            command, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a run with all that it started: SIGTERM to its process group, SIGKILL after ten seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    deadline = time.monotonic() + _STOP_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def with_known(results: dict[str, Any], known: Mapping[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    """Results by place with those that are known from runs whose folders are gone; a run that is there counts.

    Args:
        results: place -> ``runs`` (each with ``method`` and ``seed``) and other parts.
        known: the same, of an earlier report.
        methods: in the order of the report.
    """
    for place, old in known.items():
        entry = results.setdefault(place, {"runs": []})
        there = {(run["method"], run["seed"]) for run in entry["runs"]}
        runs = entry["runs"] + [run for run in old["runs"] if (run["method"], run["seed"]) not in there]
        entry["runs"] = sorted(runs, key=lambda run: (methods.index(run["method"]), run["seed"]))
        for part, value in old.items():
            entry.setdefault(part, value)
    return results
