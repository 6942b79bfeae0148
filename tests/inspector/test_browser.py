"""Chromium for the tests: found, taken from Playwright's host, or told how else to get it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "sh", "cat", "chmod", "date", "dirname", "env", "grep", "id", "mktemp", "sed", "tail", "uname")
# What Playwright downloads and unpacks, by the names of its archives.
BINARIES = ("chrome-linux64/chrome", "chrome-linux/chrome", "chrome-headless-shell-linux64/chrome-headless-shell",
            "ffmpeg-linux")  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of programs without a Chromium, and without apt-get, by which root would install one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    return folder


def run(*command: str, bare: Path, host: str = "http://127.0.0.1:1") -> subprocess.CompletedProcess[str]:
    """With another home, and Playwright's host."""
    env = {
        "HOME": str(bare.parent), "PATH": str(bare), "VIRTUAL_ENV": sys.prefix, "PLAYWRIGHT_DOWNLOAD_HOST": host,
        "PLAYWRIGHT_BROWSERS_PATH": str(bare.parent / "browsers"),
    }  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def mirror() -> Iterator[str]:
    """A host that gives a Chromium, which is the one of this machine, for every archive."""
    there = subprocess.check_output([sys.executable, "scripts/find_browser.py"], cwd=ROOT, text=True).strip()
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in BINARIES:
            entry = zipfile.ZipInfo(name)
            entry.external_attr, entry.create_system = 0o755 << 16, 3
            archive.writestr(entry, f'#!/bin/sh\nexec {there} "$@"\n')

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content.getvalue())))
            self.end_headers()
            self.wfile.write(content.getvalue())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_playwrights_own_is_installed_where_there_is_none(bare: Path, mirror: str) -> None:
    assert run(sys.executable, "scripts/find_browser.py", bare=bare).returncode == 1
    done = run("bash", "scripts/install_browser.sh", bare=bare, host=mirror)
    assert done.returncode == 0, done.stderr
    found = run(sys.executable, "scripts/find_browser.py", bare=bare)
    assert found.returncode == 0 and found.stdout.startswith(str(bare.parent / "browsers"))
    again = run("bash", "scripts/install_browser.sh", bare=bare)
    assert again.returncode == 0 and "installing" not in again.stdout


def test_a_host_that_cannot_be_reached_is_one_message_with_what_else_can_be_done(bare: Path) -> None:
    done = run("bash", "scripts/install_browser.sh", bare=bare)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "127.0.0.1:1, from which Playwright takes it, cannot be reached from here" in done.stderr
    for way in ("apt-get install chromium", "PLAYWRIGHT_DOWNLOAD_HOST=", "~/.cache/ms-playwright"):
        assert way in done.stderr


def test_one_that_does_not_start_is_not_taken_for_one(bare: Path) -> None:
    broken = bare / "chromium"
    broken.write_text("#!/bin/sh\necho 'x: error while loading shared libraries: libnss3.so' >&2\nexit 127\n")
    broken.chmod(0o755)
    done = run(sys.executable, "scripts/find_browser.py", bare=bare)
    assert done.returncode == 1
    assert "chromium does not start: x: error while loading shared libraries: libnss3.so" in done.stderr
    assert os.linesep not in done.stderr.strip()
