"""The inspector in a process of its own, as its user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(*arguments: str | Path, module: bool = False) -> list[str]:
    """The command line; or that of the package's own module, which becomes the same after ``import verl``."""
    name = "verl.utils.siop.inspector" if module else "siop_inspector"
    return [sys.executable, "-m", name, *map(str, arguments)]


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the command."""
    outer = {name: value for name, value in os.environ.items() if name != "SIOP_API_TOKEN"}
    return {**outer, "VERL_PLATFORM": "cpu", **(env or {})}


@contextmanager
def serving(
    *arguments: str | Path, env: Mapping[str, str] | None = None, module: bool = False
) -> Iterator[tuple[str, int]]:
    """Its address as it prints it, and the id of the process."""
    with subprocess.Popen(
        command(*arguments, "--port", "0", module=module),
        cwd=ROOT,
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            yield next(line for line in lines if line.startswith("http")).strip(), process.pid
        finally:
            process.terminate()
            process.wait(10)


def once(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    env = environment({"PYTHONPATH": str(ROOT)})
    return subprocess.run(
        command(*arguments), cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
    )
