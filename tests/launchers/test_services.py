"""scripts/service.sh: several services on a machine, and what is shown of a log."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Environment, bash
from scorer_process import free_port

SERVICE = """
source scripts/common.sh
source scripts/service.sh
PYTHON=$VIRTUAL_ENV/bin/python
"""
START = SERVICE + (
    'service_start thing 127.0.0.1 "$AT" "http://127.0.0.1:$AT/" 60 "$PYTHON" -m http.server "$AT" --bind 127.0.0.1'
)


def run(script: str, **env: str | Path) -> subprocess.CompletedProcess[str]:
    return bash("-euo", "pipefail", "-c", script, env=env)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[list[Path]]:
    """Two log folders, whose services are stopped at the end."""
    folders = [tmp_path / "a", tmp_path / "b"]
    yield folders
    for folder in folders:
        run(SERVICE + "service_stop thing ''", LOG_DIR=folder)


def test_two_services_of_one_name_need_two_log_folders_and_are_never_taken_for_each_other(logs: list[Path]) -> None:
    (a, b), (one, two) = logs, (str(free_port()), str(free_port()))
    assert run(START, LOG_DIR=a, AT=one).returncode == 0
    again = run(START, LOG_DIR=a, AT=two)
    assert again.returncode == 1 and f"thing is already running on port {one} (process " in again.stderr
    assert f"LOG_DIR={a} bash " in again.stderr and "a LOG_DIR and a port of its own" in again.stderr
    assert run(START, LOG_DIR=b, AT=two).returncode == 0
    for folder, own, other in ((a, one, two), (b, two, one)):
        for port in ("", own):
            status = run(SERVICE + f"service_status thing '{port}'", LOG_DIR=folder)
            assert status.returncode == 0 and f"thing is healthy on port {own} (process " in status.stdout
        for action in ("status", "stop"):
            wrong = run(SERVICE + f"service_{action} thing {other}", LOG_DIR=folder)
            expected = f"thing of LOG_DIR={folder} listens on port {own} (process "
            assert wrong.returncode == 1 and expected in wrong.stderr and f", not on {other}:" in wrong.stderr
    assert "thing is stopped" in run(SERVICE + f"service_stop thing {one}", LOG_DIR=a).stdout
    gone = run(SERVICE + "service_status thing ''", LOG_DIR=a)
    assert gone.returncode == 1 and f"thing is not running (LOG_DIR={a})" in gone.stdout
    assert run(SERVICE + "service_status thing ''", LOG_DIR=b).returncode == 0


def test_the_call_that_is_shown_finds_the_service() -> None:
    call = SERVICE + "service_call launch_retriever.sh stop"
    assert run(call).stdout == "bash launch_retriever.sh stop\n"
    assert run(call, LOG_DIR="my logs").stdout == r"LOG_DIR=my\ logs bash launch_retriever.sh stop" + "\n"


@pytest.mark.parametrize(
    ("log", "last"),
    [
        ("", "no output yet"),
        ("\n \n", "no output yet"),
        ("begun\n\n", "begun"),
        ("begun\nread: 1%\rread: 50%\rread: 90%", "read: 90%"),
        ("\rread: 1%\rread: 50%\r", "read: 50%"),
        ("\rread: 1%\rread: 100%\nserving\r\n", "serving"),
    ],
)
def test_of_a_progress_bar_in_a_log_its_last_state_is_shown(log: str, last: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(log.encode())
    env: Environment = {"LOG": path}
    assert run(SERVICE + 'log_line "$LOG"', **env).stdout == f"{last}\n"
    shown = run(SERVICE + 'log_tail 20 "$LOG"', **env).stdout
    assert "\r" not in shown and (last == "no output yet" or last in shown) and "1%" not in shown


def test_a_bad_corpus_is_told_before_the_retriever_is_started(tmp_path: Path) -> None:
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text('{"id": 1, "contents": "a"}\n{"title": "t", "text": "b"}\n')
    env: Environment = {"LOG_DIR": tmp_path / "logs", "RETRIEVER_CORPUS_FILE": corpus}
    done = bash("launch_retriever.sh", env={**env, "RETRIEVER_PORT": str(free_port())})
    assert done.returncode == 1 and "starting" not in done.stdout and not (tmp_path / "logs").exists()
    assert "bad.jsonl, line 2: 'id' must be" in done.stderr and "error: the index was not built" in done.stderr
