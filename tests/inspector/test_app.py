"""The service and the command: the token, names, limits, errors; and the export's size."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest
from dumped_run import write_run
from inspector_process import ROOT, command, environment, once, serving
from verl.utils.siop.inspector.cli import main

# Of characters that mean something in an address, in a cookie and in a header.
TOKEN = "a b;c&d=é%2Fж"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", steps=4, number=6)


@pytest.fixture(scope="module")
def service(run: Path) -> Iterator[tuple[str, int]]:
    with serving(run) as found:
        yield found


@pytest.mark.parametrize("module", [False, True])
def test_it_serves_without_torch_or_ray(run: Path, module: bool) -> None:
    with serving(run, module=module) as (url, pid):
        assert httpx.get(f"{url}health").json() == {"status": "healthy"}
        maps = {Path(entry.path).name for entry in psutil.Process(pid).memory_maps()}
        assert not any("torch" in name or "raylet" in name for name in maps)


def test_it_never_imports_what_verl_imports(run: Path) -> None:
    """Which takes seconds, before the page is there."""
    code = (
        "import runpy, sys; sys.argv = ['x', 'none']\n"
        "try: runpy.run_module('siop_inspector', run_name='__main__')\n"
        "except SystemExit: print(*sorted(name.split('.')[0] for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "verl" in done.stdout.split()
    assert set(done.stdout.split()).isdisjoint({"torch", "ray", "transformers", "tensordict", "pandas"})


def test_only_the_files_of_the_page_are_served(service: tuple[str, int]) -> None:
    url, _ = service
    for name, kind in (("main.js", "text/javascript"), ("style.css", "text/css")):
        answer = httpx.get(f"{url}page/{name}")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
    for name in ("__init__.py", "index.html", "..%2fapp.py", "../app.py", "%2e%2e/app.py", "__pycache__", "", "x.js/"):
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as raw:  # a client would shorten the path
            raw.sendall(f"GET /page/{name} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            assert raw.makefile("rb").readline().split()[1] in (b"404", b"307")


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
    huge = "9" * 30
    assert answer(f"question?run=run&step={huge}&group=x")[0] == answer(f"lines?run=run&step={huge}&group=x")[0] == 422
    wrong = [("limit=501", "limit"), ("odd=1", "odd"), ("sort=uid", "sort"), ("flags=odd", "flags")]
    wrong += [(f"{name}={huge}", name) for name in ("offset", "step_from", "clusters_to", "turns_from")]
    for path, name in wrong:
        status, text = answer(f"questions?run=run&{path}")
        assert status == 422 and name in text
    policy = httpx.get(url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_token_is_asked_of_everybody(run: Path) -> None:
    with serving(run, env={"SIOP_API_TOKEN": TOKEN}) as (printed, _):
        url = printed.split("?")[0]
        assert printed == f"{url}?token={quote(TOKEN, safe='')}"
        assert httpx.get(f"{url}health").status_code == 200
        wrong = [(b"Authorization", b"Bearer other"), (b"Authorization", TOKEN.encode()), (b"Cookie", b"x")]
        for headers in ([], *([one] for one in wrong)):
            assert httpx.get(f"{url}api/runs", headers=headers).status_code == 401
        assert httpx.get(f"{url}?token=other").status_code == 401
        right = [(b"Authorization", f"Bearer {TOKEN}".encode())]
        assert httpx.get(f"{url}api/runs", headers=right).status_code == 200
        with httpx.Client(follow_redirects=True) as browser:
            answer = browser.get(printed)
            assert answer.status_code == 200 and str(answer.url) == url
            assert browser.get(f"{url}api/runs").status_code == 200
            assert TOKEN not in str(browser.cookies)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none is no folder of a run: it does not exist"),
        (["RUN/rollouts/1.jsonl"], "1.jsonl is no folder of a run: it is a file"),
        (["RUN/../nothing"], "nothing holds no dump: there is neither rollouts/ nor a STEP.jsonl in it"),
        (["RUN", "--recompute", "gamma=abc"], "gamma='abc' is not allowed"),
        (["RUN", "--recompute", "siop_gain=odd", "--export", "OUT"], "siop_gain='odd' is not allowed"),
        (["RUN", "--export", "OUT", "--port", "1"], "--port 1 has no effect with --export"),
        (["RUN", "--export", "OUT", "--host", "::"], "--host :: has no effect with --export"),
        (["RUN", "--export", "OUT/out.html"], "it must be a file in a folder that exists"),
        (["RUN", "--export", "RUN"], "it must be a file in a folder that exists"),
        (["RUN", "--export", "OUT", "--export-mb", "nan"], "--export-mb is nan, it must be a number above 0"),
        (["RUN/../empty", "--export", "OUT"], "no step of empty can be exported: none has been dumped"),
        (["RUN", "--recompute", "siop_boundary=assistant"], "siop_boundary takes new scores"),
        (["RUN", "--port", "70000"], "--port is 70000"),
        (["RUN", "--export-mb", "5"], "--export-mb 5 has no effect without --export"),
        (["RUN", "--export", "OUT", "--export-mb", "0.01"], "--export-mb 0.01 is too small"),
    ],
)
def test_a_wrong_command_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for name in ("nothing", "empty/rollouts"):
        (run.parent / name).mkdir(parents=True, exist_ok=True)
    places = {"RUN": str(run), "OUT": str(tmp_path / "out.html")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    try:
        assert main(arguments) == 1
    except SystemExit as end:  # of the option parser
        assert end.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and message in last
    assert not (tmp_path / "out.html").exists()


def test_presets_are_found_from_any_folder(run: Path, tmp_path: Path) -> None:
    done = once(run, "--export", tmp_path / "out.html", "--recompute", "ablation=release", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_vanishes_is_told_and_read_again_when_it_is_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)

    def until(steps: int, problem: str) -> None:
        for _ in range(200):
            (state,) = httpx.get(f"{url}api/runs").json()["runs"]
            if state["steps"] == steps and problem in "".join(state["problems"] or ["none"]):
                return
            time.sleep(0.1)
        raise AssertionError(state)

    with serving(run) as (url, _):
        until(2, "none")
        run.rename(tmp_path / "away")
        until(2, "is gone")
        answer = httpx.get(f"{url}api/question?run=run&step=1&group=u-1-0")
        assert answer.status_code == 500 and "1.jsonl" in answer.json()["detail"]
        write_run(run, steps=3)
        until(3, "none")


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """The service at any port, with what it says."""
    pipe = subprocess.PIPE
    line = command(*arguments, "--port", "0")
    return subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_quietly(run: Path, stop: signal.Signals) -> None:
    process = started(run)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(stop)
    _, said = process.communicate(timeout=30)
    assert said == "" and process.returncode in (0, 130, -stop)


def test_an_open_address_needs_a_token(run: Path) -> None:
    """And the address that is printed is one that can be opened."""
    host = "0.0.0.0"
    done = once(run, "--host", host, "--port", "0")
    message = f"error: --host {host} shows the rollouts to whoever reaches it: set SIOP_API_TOKEN"
    assert (done.returncode, done.stderr.splitlines(), done.stdout) == (1, [message], "")
    with serving(run, "--host", host, env={"SIOP_API_TOKEN": "t"}) as (url, _):
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(url, follow_redirects=True).status_code == 200
        assert httpx.get(f"{url.split('?')[0]}api/runs").status_code == 401


def test_every_own_address_of_the_machine_is_a_local_one(run: Path) -> None:
    with serving(run, "--host", "127.0.0.2") as (url, _):
        assert url.startswith("http://127.0.0.2:") and httpx.get(f"{url}api/runs").status_code == 200
        assert httpx.get(f"{url}api/runs", headers={"Host": "evil.example"}).status_code == 400


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
