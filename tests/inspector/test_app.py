"""The service and the command: the token, names, limits, errors; and the export's size."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from dumped_run import write_run
from inspector_process import once, serving

TOKEN = "a b;c"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", steps=4, number=6)


@pytest.fixture(scope="module")
def service(run: Path) -> Iterator[tuple[str, int]]:
    with serving(run, module=True) as found:
        yield found


def test_it_serves_without_torch_or_ray(service: tuple[str, int]) -> None:
    url, pid = service
    assert httpx.get(f"{url}health").json() == {"status": "healthy"}
    maps = {Path(entry.path).name for entry in psutil.Process(pid).memory_maps()}
    assert not any("torch" in name or "raylet" in name for name in maps)


def test_only_its_own_names_are_answered(service: tuple[str, int]) -> None:
    url, _ = service
    assert httpx.get(url, headers={"Host": "localhost:1234"}).status_code == 200
    assert httpx.get(f"{url}api/runs", headers={"Host": "evil.example"}).status_code == 400


def test_what_is_asked_wrongly_is_told(service: tuple[str, int]) -> None:
    url, _ = service

    def answer(path: str) -> tuple[int, str]:
        found = httpx.get(f"{url}api/{path}")
        return found.status_code, found.text

    assert answer("curves?run=other") == (404, '{"detail":"no run other; there are run"}')
    assert answer("question?run=run&step=1&group=x")[0] == 404
    for path, name in (("limit=501", "limit"), ("odd=1", "odd"), ("sort=uid", "sort"), ("flags=odd", "flags")):
        status, text = answer(f"questions?run=run&{path}")
        assert status == 422 and name in text
    policy = httpx.get(url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_token_is_asked_of_everybody(run: Path) -> None:
    with serving(run, env={"SIOP_API_TOKEN": "secret-token"}) as (printed, _):
        url = printed.split("?")[0]
        assert printed == f"{url}?token=secret-token"
        assert httpx.get(f"{url}health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret-token"}, {"Cookie": "x"}):
            assert httpx.get(f"{url}api/runs", headers=headers).status_code == 401
        assert httpx.get(f"{url}?token=other").status_code == 401
        assert httpx.get(f"{url}api/runs", headers={"Authorization": "Bearer secret-token"}).status_code == 200
        with httpx.Client(follow_redirects=True) as browser:
            answer = browser.get(printed)
            assert answer.status_code == 200 and str(answer.url) == url
            assert browser.get(f"{url}api/runs").status_code == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none is no folder of a run: it does not exist"),
        (["RUN", "--recompute", "siop_boundary=assistant"], "siop_boundary takes new scores"),
        (["RUN", "--port", "70000"], "--port is 70000"),
        (["RUN", "--export-mb", "5"], "--export-mb 5 has no effect without --export"),
        (["RUN", "--export", "OUT", "--export-mb", "0.01"], "--export-mb 0.01 is too small"),
    ],
)
def test_a_wrong_command_is_one_line(run: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"RUN": str(run), "OUT": str(tmp_path / "out.html")}
    done = once(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode in (1, 2)
    last = done.stderr.splitlines()[-1]
    assert "error: " in last and message in last
    assert not (tmp_path / "out.html").exists()


def test_a_port_in_use_is_told(run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = once(run, "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "cannot listen on" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("megabytes", [0.15, 0.2, 20])
def test_an_export_keeps_its_size_and_says_what_it_left_out(run: Path, tmp_path: Path, megabytes: float) -> None:
    out = tmp_path / "out.html"
    done = once(run, "--export", out, "--export-mb", str(megabytes))
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size <= megabytes * 1e6
    said = done.stderr.splitlines()[-1]
    assert ("all of its 24 questions" in said) == (megabytes == 20), said
    if megabytes < 20:
        assert "of its 24 questions" in said and "of 4 steps" in said
