"""One output folder has one trainer."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scorer_process import ROOT
from verl.trainer.siop.run.lock import OutputInUse, output_lock

HOLDER = """
import sys, time
from pathlib import Path
from verl.trainer.siop.run.lock import output_lock
with output_lock(Path(sys.argv[1]), "logs/first.log"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds ``out``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_held_folder_names_its_holder_and_a_killed_one_leaves_nothing(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(OutputInUse) as refused, output_lock(folder):
        pass
    text = str(refused.value)
    assert text.startswith(f"trainer.default_local_dir={folder} is the output folder of another run: ")
    assert f"process {holder.pid} on {socket.gethostname()} since 20" in text and ", log logs/first.log;" in text
    with output_lock(tmp_path / "other"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with output_lock(folder, None):
        owner = json.loads((folder / ".lock").read_text())
        assert (owner["pid"], owner["log"]) == (os.getpid(), None)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "not JSON"])
def test_a_holder_that_has_not_written_its_name_yet(holder: subprocess.Popen[str], tmp_path: Path, text: str) -> None:
    (tmp_path / "out" / ".lock").write_text(text)
    with (
        pytest.raises(OutputInUse, match=r"another run: a process that .lock does not name; stop"),
        output_lock(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), output_lock(tmp_path):
        pass
    (record,) = caplog.records
    assert f"{tmp_path} cannot be locked" in record.getMessage()


def test_other_failures_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="input/output error"), output_lock(tmp_path):
        pass
