"""The retriever service, as a real process over HTTP."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from corpora import PASSAGES, write_corpus
from verl.utils.siop.retriever.index import Hits
from verl.utils.siop.retriever.server import create_app, main


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "verl.utils.siop.retriever.server", *args]


@contextlib.contextmanager
def running(folder: Path, start: Sequence[str]) -> Iterator[tuple[str, int]]:
    """URL and process id of a retriever over ``PASSAGES``, started by a command that lacks corpus and port."""
    corpus = write_corpus(folder / "corpus.jsonl", PASSAGES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "log").open("w") as log:
        arguments = [*start, "--corpus", str(corpus), "--port", str(port)]
        process = subprocess.Popen(arguments, stderr=log, stdout=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            try:
                httpx.get(url + "/health").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.2)
        assert f"serving {len(PASSAGES)} documents" in (folder / "log").read_text()
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with running(tmp_path_factory.mktemp("retriever"), command()) as found:
        yield found


@pytest.fixture(scope="module")
def service(process: tuple[str, int]) -> str:
    return process[0]


class HeldIndex:
    """Searches that begin at once and end when they may."""

    def __init__(self) -> None:
        self.searched: list[str] = []
        self.go_on = threading.Event()

    def __len__(self) -> int:
        return 1

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        self.searched += queries
        assert self.go_on.wait(60)
        return [[] for _ in queries]


@contextlib.contextmanager
def serving(index: HeldIndex, **limits: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(index, **limits), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        index.go_on.set()
        server.should_exit = True
        thread.join(60)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_wire_format(service: str) -> None:
    body = {"queries": ["founder kovaco tozex", "zebra"], "topk": 3, "return_scores": True}
    (first, second) = httpx.post(service + "/retrieve", json=body).json()["result"]
    assert [hit["document"] for hit in first] == [{"id": f"p{i}", "contents": PASSAGES[i]} for i in (0, 1)]
    assert first[0]["score"] > first[1]["score"] > 0 and second == []
    body = {"queries": ["founder kovaco tozex"], "topk": 1}
    assert httpx.post(service + "/retrieve", json=body).json() == {"result": [[{"id": "p0", "contents": PASSAGES[0]}]]}
    # Without topk, the server's own default of 3.
    assert len(httpx.post(service + "/retrieve", json={"queries": ["kovaco nila peruo"]}).json()["result"][0]) == 3
    health = httpx.get(service + "/health").json()
    assert len(health.pop("corpus_sha256")) == 64
    assert health == {"status": "healthy", "documents": len(PASSAGES), "topk": 3, "kind": "bm25"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "queries"),
        ({"queries": []}, "queries"),
        ({"queries": "founder"}, "queries"),
        ({"queries": ["a", 3]}, "queries"),
        ({"queries": ["a" * 5000]}, "queries"),
        ({"queries": ["a"] * 600}, "queries"),
        ({"queries": ["a"], "topk": 0}, "topk"),
        ({"queries": ["a"], "topk": 101}, "topk"),
        ({"queries": ["a"], "topk": "3"}, "topk"),
        ({"queries": ["a"], "return_scores": "no"}, "return_scores"),
        ({"queries": ["a"], "top_k": 3}, "top_k"),
    ],
)
def test_bad_request_gets_422_with_the_field(service: str, body: dict, field: str) -> None:
    response = httpx.post(service + "/retrieve", json=body)
    assert response.status_code == 422
    assert field in {part for error in response.json()["detail"] for part in error["loc"]}


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        (b'{"queries": ["\\ud800"]}', ["body", "queries", 0]),
        (b'{"queries": ["a"], "topk": NaN}', ["body", "topk"]),
        (b'{"queries": ["a"], "topk": 1e999}', ["body", "topk"]),
        (b'{"queries": ["a"], "\\ud800": 1}', ["body"]),
        (b'{"queries": ["%s"]}' % (b"a" * 100_000), ["body", "queries", 0]),
        (b'{"queries": ["a"], "%s": 1}' % (b"a" * 100_000), ["body", "a" * 100]),
        (b'{"queries": [%s]}' % b",".join([b"1"] * 500), ["body", "queries", 0]),
    ],
)
def test_input_is_not_repeated_in_the_answer(service: str, body: bytes, loc: list[str | int]) -> None:
    response = httpx.post(service + "/retrieve", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422 and len(response.content) < 5000
    (first, *others) = response.json()["detail"]
    assert first["loc"] == loc and first["msg"]
    assert len(others) < 20 or [error["msg"] for error in others[19:]] == ["and 480 more errors"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", None])
def test_a_body_that_is_not_called_json_is_refused_with_the_header(service: str, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    response = httpx.post(service + "/retrieve", content=b'{"queries": ["a"]}', headers=headers)
    (error,) = response.json()["detail"]
    assert response.status_code == 422 and "with the header Content-Type: application/json" in error["msg"]
    assert (kind or "none") in error["msg"]


def test_a_body_is_bounded_by_a_limit_that_the_answer_names(process: tuple[str, int]) -> None:
    url, pid = process

    def peak_mb() -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert found
        return int(found[1]) // 1024

    # The longest that the other limits allow, in UTF-8.
    queries = json.dumps({"queries": ["\U0001f600" * 4096] * 512}, ensure_ascii=False).encode()
    json_type = {"Content-Type": "application/json"}
    response = httpx.post(url + "/retrieve", content=queries, headers=json_type, timeout=60)
    assert response.status_code == 200 and response.json() == {"result": [[]] * 512}
    before = peak_mb()
    megabyte = b" " * 2**20
    declared = httpx.post(url + "/retrieve", content=megabyte * 300, headers=json_type, timeout=60)
    assert declared.status_code == 413
    assert declared.json() == {"detail": f"the body is larger than {16 * 2**20} bytes (--max-body-mb)"}
    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
        chunked = httpx.post(url + "/retrieve", content=(megabyte for _ in range(300)), headers=json_type, timeout=60)
        assert chunked.status_code == 413 and "--max-body-mb" in chunked.text
    assert peak_mb() < before + 60
    assert httpx.get(url + "/health").status_code == 200


def test_the_head_of_a_request_is_bounded_in_size(process: tuple[str, int]) -> None:
    address = httpx.URL(process[0])
    with socket.create_connection((address.host, address.port or 0), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(256):
                connection.sendall(b"a" * 2**16)
                sent += 1
        assert sent < 256


def test_the_head_of_a_request_is_bounded_in_time(tmp_path: Path) -> None:
    code = (
        "import logging, sys; from verl.utils.siop.http.server import TimedHttpProtocol; "
        "from verl.utils.siop.retriever.server import main; TimedHttpProtocol.head_timeout_s = 0.5; "
        "logging.basicConfig(level=logging.INFO, force=True); sys.exit(main())"
    )
    with running(tmp_path, [sys.executable, "-c", code]) as (url, _):
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port or 0), timeout=20) as connection:
            connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\n")
            assert connection.recv(1000) == b""
        assert httpx.post(url + "/retrieve", json={"queries": ["twin"]}).status_code == 200


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    index = HeldIndex()
    with serving(index, body_timeout_s=0.3, max_concurrency=1) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port or 0), timeout=20) as connection:
            connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        index.go_on.set()
        assert httpx.post(url + "/retrieve", json={"queries": ["a"]}).status_code == 200


def test_requests_at_once_are_bounded_and_others_wait() -> None:
    index = HeldIndex()

    def ask(query: str) -> httpx.Response:
        return httpx.post(url + "/retrieve", json={"queries": [query]}, timeout=60)

    with serving(index, max_concurrency=2, max_waiting=1) as url, ThreadPoolExecutor(3) as threads:
        working = [threads.submit(ask, "first"), threads.submit(ask, "first")]
        wait_for(lambda: len(index.searched) == 2)
        with pytest.raises(httpx.ReadTimeout):  # it waits until its client gives up
            httpx.post(url + "/retrieve", json={"queries": ["gone"]}, timeout=0.5)
        refused = ask("refused")
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert "the limit is 3" in refused.json()["detail"]
        assert httpx.get(url + "/health", timeout=20).status_code == 200
        assert index.searched == ["first"] * 2
        index.go_on.set()
        assert [answer.result().json() for answer in working] == [{"result": [[]]}] * 2
        assert ask("later").status_code == 200
        assert index.searched == ["first", "first", "later"]


def test_health_is_answered_while_every_thread_searches() -> None:
    index = HeldIndex()
    with serving(index, max_concurrency=100) as url, ThreadPoolExecutor(45) as threads:
        limits = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=50))
        asked = [threads.submit(limits.post, url + "/retrieve", json={"queries": ["a"]}) for _ in range(45)]
        wait_for(lambda: len(index.searched) == 40)
        assert httpx.get(url + "/health", timeout=20).json() == {"status": "healthy", "documents": 1, "topk": 3}
        index.go_on.set()
        assert {answer.result().status_code for answer in asked} == {200}


def test_server_with_a_busy_port_fails_with_one_line(service: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", PASSAGES)
    args = command("--corpus", str(corpus), "--port", service.rsplit(":", 1)[1])
    result = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot listen on 127.0.0.1:")
    assert "Address already in use" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_an_open_address_is_warned_of(host: str, warned: bool, tmp_path: Path) -> None:
    with running(tmp_path, command("--host", host)):
        assert (f"whoever reaches {host} can search" in (tmp_path / "log").read_text()) == warned


def test_server_with_a_bad_corpus_or_argument_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name, message in (("none.jsonl", "No such file"), ("empty.jsonl", "is empty"), (".", "is not a file")):
        assert main(["--corpus", str(tmp_path / name), "--port", "0"]) == 1
        assert f"{message}" in capsys.readouterr().err.splitlines()[-1]
    for option, value in (("port", "70000"), ("max-body-mb", "0"), ("max-body-mb", "nan"), ("max-concurrency", "0")):
        with pytest.raises(SystemExit) as caught:
            main(["--corpus", "c.jsonl", f"--{option}", value])
        assert caught.value.code == 2 and f"{option} is a number" in capsys.readouterr().err
