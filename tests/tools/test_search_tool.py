"""The search tools: configuration, the model's mistakes, a real retriever process, and failures inside verl's loop."""

import asyncio
import contextlib
import gzip
import http.client
import json
import logging
import socket
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from scorer_process import free_port
from search_calls import search_all
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall
from verl.tools.http_tool import SearchRefused, SearchUnavailable, _read
from verl.tools.local_search_tool import LocalSearchTool
from verl.tools.search_common import MAX_QUERY_CHARS, format_hits
from verl.tools.serper_search_tool import SerperSearchTool
from verl.tools.tool_registry import load_all_tools
from verl.utils.siop.errors import SiopConfigError

ROOT = Path(__file__).parents[2]
PASSAGES = ["the founder of kovaco tozex is nila bodson .", "the chief of kovaco tozex is maro tinson ."]


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    corpus = tmp_path_factory.mktemp("retriever") / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": i, "contents": p}) + "\n" for i, p in enumerate(PASSAGES)))
    port = free_port()
    args = [sys.executable, "-m", "verl.utils.siop.retriever.server", "--corpus", str(corpus), "--port", str(port)]
    process = subprocess.Popen(args)
    try:
        for _ in range(300):
            assert process.poll() is None
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/retrieve"
    finally:
        process.terminate()
        process.wait(20)


def test_searches_a_real_retriever(retriever: str) -> None:
    tool = LocalSearchTool({"type": "native", "retrieval_service_url": retriever, "topk": 2})
    queries = ({"query": " founder kovaco tozex "}, {"query": "maro"}, {"query": "zebra"})
    found, one, nothing = search_all(tool, *queries, close=False)
    assert found == (f"[1] {PASSAGES[0]}\n[2] {PASSAGES[1]}", {"search/hits": 2, "search/invalid_calls": 0})
    assert one[0] == f"[1] {PASSAGES[1]}"
    assert nothing == ("nothing found", {"search/hits": 0, "search/invalid_calls": 0})
    # Again on another event loop: the pooled connections of the first one are not reused.
    assert search_all(tool, {"query": "maro"}) == [one]


def test_long_results_are_cut(retriever: str) -> None:
    tool = LocalSearchTool({"retrieval_service_url": retriever, "max_chars": 20})
    assert search_all(tool, {"query": "maro"})[0][0] == f"[1] {PASSAGES[1]}"[:20]
    assert format_hits(["a\n", "b"], 99) == "[1] a\n[2] b"


@pytest.mark.parametrize(
    ("passage", "shown"),
    [
        ('"Paris"\nThe capital.\n\nIt has 2 towers.', '"Paris"\nThe capital.\n\nIt has 2 towers.'),
        ("a\n[2] b", "a [2] b"),
        ("a\r\n \n [ 12 ] b", "a     [ 12 ] b"),
        ("a\u2028\u200b[2] b", "a \u200b[2] b"),
        ("a\n［２］ b", "a ［２］ b"),
        ("a\n\nQuery 2:\n[1] b", "a  Query 2: [1] b"),
        ("a\nquery  2:\nNothing found", "a query  2: Nothing found"),
        ("a\n1990 [2] query 2", "a\n1990 [2] query 2"),
    ],
)
def test_no_passage_writes_the_heading_of_another(passage: str, shown: str) -> None:
    assert format_hits([passage, "z"], 99) == f"[1] {shown}\n[2] z"


def test_headings_are_looked_for_in_linear_time() -> None:
    started = time.monotonic()
    for text in ("\n" * 300_000, "\n[" * 150_000, "\n \u200b" * 100_000, "\n" + "[" * 300_000, "\nquery" * 50_000):
        format_hits([f"a{text}b"], 10**6)
    assert time.monotonic() - started < 20


def test_what_is_not_asked_for_or_empty_is_no_hit(scripted_service: Any) -> None:
    url, answers, _ = scripted_service
    found = ["", " \n", "\u200b", "a", "b", "c"]
    answers.append((200, {"result": [[{"document": {"contents": text}} for text in found]]}))
    tool = LocalSearchTool({"retrieval_service_url": url, "topk": 2})
    assert search_all(tool, {"query": "x"}) == [("[1] a\n[2] b", {"search/hits": 2, "search/invalid_calls": 0})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "query is missing"),
        ({"q": "x"}, "query is missing"),
        ({"query": None}, "query must be text, got NoneType"),
        ({"query": ["x"]}, "query must be text, got list"),
        ({"query": "  "}, "query is empty"),
        (["x"], "expected an object with a query, got list"),
        ({"query": "x" * (MAX_QUERY_CHARS + 1)}, "query is longer than 4096 characters"),
        ({"query": "x\ud800"}, "query has half a surrogate pair"),
    ],
)
def test_a_malformed_call_is_answered_to_the_model(arguments: Any, message: str) -> None:
    tool = LocalSearchTool({"retrieval_service_url": "http://127.0.0.1:9/retrieve", "max_retries": 0})
    ((text, metrics),) = search_all(tool, arguments)
    assert text == f"invalid arguments: {message}" and metrics == {"search/hits": 0, "search/invalid_calls": 1}


def test_the_longest_query_is_one_that_the_retriever_takes(retriever: str) -> None:
    tool = LocalSearchTool({"retrieval_service_url": retriever, "topk": 1, "max_retries": 0})
    ((text, _),) = search_all(tool, {"query": " maro" + " ?" * ((MAX_QUERY_CHARS - 4) // 2)})
    assert text == f"[1] {PASSAGES[1]}"


def test_proxies_of_the_environment_are_for_the_web_search_only(
    retriever: str, scripted_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, answers, asked = scripted_service
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.removesuffix("/retrieve"))
        monkeypatch.setenv(name.lower(), proxy.removesuffix("/retrieve"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    answers += [(200, {"organic": [{"title": "T"}]}), (502, {})]
    web = SerperSearchTool({"api_url": "http://serper.invalid/search", "api_key": "k", "max_retries": 0})
    assert search_all(web, {"query": "x"})[0][0] == "[1] T"
    assert [request["path"] for request in asked] == ["http://serper.invalid/search"]
    tool = LocalSearchTool({"retrieval_service_url": retriever, "max_retries": 0})
    assert search_all(tool, {"query": "maro"})[0][0] == f"[1] {PASSAGES[1]}" and len(asked) == 1


def test_an_answer_that_trickles_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
                    for _ in range(300):
                        connection.sendall(b" ")
                        time.sleep(0.05)

        Thread(target=trickle, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/retrieve"
        tool = LocalSearchTool({"retrieval_service_url": url, "timeout_s": 0.5, "max_retries": 0})
        started = time.monotonic()
        (error,) = search_all(tool, {"query": "x"})
    assert isinstance(error, SearchUnavailable) and "no answer within 0.5 s" in str(error)
    assert time.monotonic() - started < 10


def test_the_time_until_its_turn_is_no_failure(scripted_service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, answers, asked = scripted_service
    monkeypatch.setattr("verl.tools.http_tool._MAX_CONNECTIONS", 1)

    running: list[str] = []

    class SlowTool(LocalSearchTool):
        async def fetch(self, client: httpx.AsyncClient, query: str) -> list[str]:
            running.append(query)
            assert len(running) == 1
            await asyncio.sleep(1.0)
            running.pop()
            return await super().fetch(client, query)

    answers += [(200, {"result": [[]]})] * 4
    tool = SlowTool({"retrieval_service_url": url, "timeout_s": 3, "max_retries": 0})
    results = search_all(tool, *({"query": f"{i}"} for i in range(4)))
    assert [text for text, _ in results] == ["nothing found"] * 4 and len(asked) == 4


def test_any_failure_ends_the_rollout(scripted_service: Any) -> None:
    url, answers, _ = scripted_service
    answers.append((200, {"result": [[]]}, {"Content-Encoding": "gzip"}))
    (error,) = search_all(LocalSearchTool({"retrieval_service_url": url, "max_retries": 0}), {"query": "x"})
    assert isinstance(error, SearchUnavailable) and "DecodingError" in str(error)

    class BrokenTool(LocalSearchTool):
        async def fetch(self, client: httpx.AsyncClient, query: str) -> list[str]:
            raise KeyError("broken")

    async def run() -> None:
        tool = BrokenTool({"retrieval_service_url": url})
        instance, _ = await tool.create()
        with pytest.raises(KeyError):
            await tool.execute(instance, {"query": "x"})
        with pytest.raises(KeyError, match="broken"):
            await tool.release(instance)

    asyncio.run(run())


def test_results_hold_no_half_surrogate_pairs() -> None:
    assert format_hits(["a\ud83d", "\U0001f600"], 99) == "[1] a?\n[2] \U0001f600"


def test_a_retriever_that_is_down_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    url = f"http://127.0.0.1:{free_port()}/retrieve"
    tool = LocalSearchTool({"retrieval_service_url": url, "max_retries": 1})
    with caplog.at_level(logging.ERROR):
        results = search_all(tool, {"query": "x"}, {"query": "y"})
    assert all(isinstance(error, SearchUnavailable) and isinstance(error, ConnectionError) for error in results)
    assert url in str(results[0]) and "2 attempt(s)" in str(results[0]) and "ConnectError" in str(results[0])
    # Once, not once per rollout.
    assert [r.levelname for r in caplog.records] == ["ERROR"] and url in caplog.text


def test_verl_ends_the_rollout_when_the_retriever_is_down() -> None:
    # verl's tool loop turns an exception of `execute` into text for the model; ours must come out all the same.
    tool = LocalSearchTool({"retrieval_service_url": f"http://127.0.0.1:{free_port()}/retrieve", "max_retries": 0})
    loop = ToolAgentLoop.__new__(ToolAgentLoop)
    loop.tools, loop.max_tool_response_length, loop.tool_response_truncate_side = {"search": tool}, 256, "left"

    agent_data: Any = None

    def call(arguments: str) -> Any:
        return asyncio.run(loop._call_tool(FunctionCall(name="search", arguments=arguments), {}, agent_data))

    with pytest.raises(SearchUnavailable):
        call('{"query": "x"}')
    response, _, _ = call('{"question": "x"}')
    assert response.text == "invalid arguments: query is missing"


@contextlib.contextmanager
def _answering(head: bytes, chunks: Iterable[bytes]) -> Iterator[str]:
    """A server that gives one answer, as far as somebody reads it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection, connection.makefile("rb") as request:
                    # To its end: closing with unread bytes would reset the connection under the answer.
                    request.readline()
                    request.read(int(http.client.parse_headers(request)["Content-Length"]))
                    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + head + b"\r\n")
                    for chunk in chunks:
                        connection.sendall(chunk)

        Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/retrieve"


def _bomb() -> bytes:
    """A GB of spaces, packed, in a MB."""
    packer = zlib.compressobj(wbits=31)
    return b"".join([*(packer.compress(b" " * 2**20) for _ in range(1024)), packer.flush()])


@pytest.mark.parametrize("packed", [True, False])
def test_an_answer_that_is_too_large_is_not_read_to_its_end(packed: bool) -> None:
    head = b"Content-Encoding: gzip\r\n" if packed else b""
    chunks = [_bomb()] if packed else (b" " * 2**20 for _ in range(10**6))
    with _answering(head, chunks) as url:
        (error,) = search_all(LocalSearchTool({"retrieval_service_url": url, "max_retries": 0}), {"query": "x"})
    assert isinstance(error, SearchRefused) and "more than 33,554,432 bytes (unpacked)" in str(error)


def test_a_packed_answer_takes_no_more_memory_than_what_is_read() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield _bomb()

    packed = httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=chunks())
    tracemalloc.start()
    try:
        assert len(asyncio.run(_read(packed, 10**6))) == 10**6 + 1
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_packed_answers_are_read_and_only_gzip_is_asked_for(scripted_service: Any) -> None:
    body = gzip.compress(json.dumps({"result": [[{"document": {"contents": "a"}}]]}).encode())
    with _answering(b"Content-Encoding: gzip\r\n", [body[:20], body[20:]]) as url:
        ((text, _),) = search_all(LocalSearchTool({"retrieval_service_url": url, "max_retries": 0}), {"query": "x"})
    assert text == "[1] a"
    for head, chunk in (("gzip", body[:-9]), ("gzip, gzip", body), ("br", body)):
        with _answering(f"Content-Encoding: {head}\r\n".encode(), [chunk]) as url:
            (error,) = search_all(LocalSearchTool({"retrieval_service_url": url, "max_retries": 0}), {"query": "x"})
        assert isinstance(error, SearchUnavailable) and "DecodingError" in str(error), head
    url, answers, asked = scripted_service
    answers.append((500, "x" * 10**6))
    (error,) = search_all(LocalSearchTool({"retrieval_service_url": url, "max_retries": 0}), {"query": "x"})
    assert isinstance(error, SearchUnavailable) and len(str(error)) < 500
    assert asked[0]["headers"]["Accept-Encoding"] == "gzip"


def test_a_failing_retriever_is_tried_again(scripted_service: Any) -> None:
    url, answers, asked = scripted_service
    answers += [(503, {}), (500, {}), (200, {"result": [[{"document": {"contents": "a"}, "score": 1}]]})]
    tool = LocalSearchTool({"retrieval_service_url": url, "max_retries": 2, "topk": 7})
    assert search_all(tool, {"query": "x"}) == [("[1] a", {"search/hits": 1, "search/invalid_calls": 0})]
    assert [a["body"] for a in asked] == [{"queries": ["x"], "topk": 7, "return_scores": True}] * 3


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (422, {"detail": "topk"}, "HTTP 422"),
        (200, {"result": []}, "no list of hits"),
        (200, {"results": [[]]}, "no list of hits"),
        (200, {"result": [[{"contents": "a"}]]}, "no list of hits"),
        (200, {"result": [[{"document": {"contents": None}}]]}, "not text"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(scripted_service: Any, status: int, answer: Any, message: str) -> None:
    url, answers, asked = scripted_service
    answers.append((status, answer))
    (error,) = search_all(LocalSearchTool({"retrieval_service_url": url}), {"query": "x"})
    assert isinstance(error, SearchRefused) and message in str(error) and len(asked) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"retriever_url": "http://x", "top_k": 1},
            "unknown config key.* retriever_url, top_k; allowed: topk, timeout_s",
        ),
        ({"topk": 0}, "topk must be an integer of at least 1, got 0"),
        ({"topk": "3"}, "topk must be"),
        ({"max_retries": True}, "max_retries must be"),
        ({"timeout_s": 0}, "timeout_s must be a positive number"),
        ({"timeout_s": float("nan")}, "timeout_s must be a positive number"),
        ({"max_chars": 0}, "max_chars must be"),
        ({"retrieval_service_url": ""}, "retrieval_service_url must be an http"),
        ({"retrieval_service_url": "127.0.0.1:8000"}, "retrieval_service_url must be an http"),
        ({"retrieval_service_url": "http://"}, "retrieval_service_url must be an http"),
        ({"retrieval_service_url": "http://[::1"}, "retrieval_service_url must be an http"),
        ({"retrieval_service_url": "http://x:65536/"}, "a port from 1 to 65535, got 'http://x:65536/'"),
        ({"retrieval_service_url": "http://x:0/"}, "a port from 1 to 65535"),
        ({"retrieval_service_url": "http://x:-1/"}, "a port from 1 to 65535"),
    ],
)
def test_wrong_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SiopConfigError, match=message):
        LocalSearchTool({"type": "native", **config})


def test_shipped_configs_load_in_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(ROOT / "config" / "local_search_tool_config.yaml")
    monkeypatch.delenv("RETRIEVER_URL", raising=False)

    def load(path: str) -> Any:
        (tool,) = load_all_tools(path, None)
        return tool

    tool = load(path)
    assert tool.name == "search" and tool.settings.retrieval_service_url == "http://127.0.0.1:8000/retrieve"
    monkeypatch.setenv("RETRIEVER_URL", "http://10.0.0.1:9/retrieve")
    assert load(path).settings.retrieval_service_url == "http://10.0.0.1:9/retrieve"
    serper = str(ROOT / "config" / "serper_tool_config.yaml")
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(SiopConfigError, match="SERPER_API_KEY"):
        load(serper)
    monkeypatch.setenv("SERPER_API_KEY", "k")
    assert load(serper).name == "search"


def test_serper(scripted_service: Any, caplog: pytest.LogCaptureFixture) -> None:
    url, answers, asked = scripted_service
    tool = SerperSearchTool({"api_url": url, "api_key": "s3cret", "topk": 2, "max_retries": 0})
    hits = [{"title": "T", "snippet": "S"}, {"title": "U"}, {"title": "V", "snippet": "W"}]
    answers += [
        (200, {"organic": hits}),
        (200, {"searchParameters": {"q": "x"}}),
        (403, {"message": "bad key"}),
        (500, {}),
    ]
    assert search_all(tool, {"query": "x"})[0][0] == "[1] T: S\n[2] U"
    assert asked[0]["headers"]["X-API-KEY"] == "s3cret"
    assert asked[0]["body"] == {"q": "x", "num": 2, "gl": "us", "hl": "en"}
    assert search_all(tool, {"query": "x"})[0][0] == "nothing found"
    with caplog.at_level(logging.DEBUG):
        refused, down = search_all(tool, {"query": "x"})[0], search_all(tool, {"query": "x"})[0]
    assert isinstance(refused, SearchRefused) and isinstance(down, SearchUnavailable)
    assert "s3cret" not in f"{refused}{down}{tool.settings}{caplog.text}"


def test_the_key_is_in_no_message(scripted_service: Any, caplog: pytest.LogCaptureFixture) -> None:
    url, answers, asked = scripted_service
    answers += [(403, {"message": "unknown key s3cret"}), (500, "s3cret"), (200, {"organic": [{"title": 3}]})]
    # Read from a file, a key often ends with a line break.
    tool = SerperSearchTool({"api_url": f"{url}?key=s3cret", "api_key": "s3cret\n", "max_retries": 0})
    with caplog.at_level(logging.WARNING):
        refused, down, wrong = (search_all(tool, {"query": "x"})[0] for _ in range(3))
    assert [request["headers"]["X-API-KEY"] for request in asked] == ["s3cret"] * 3
    assert isinstance(refused, SearchRefused) and "unknown key [secret]" in str(refused)
    assert isinstance(down, SearchUnavailable) and isinstance(wrong, SearchRefused) and "texts as title" in str(wrong)
    assert "s3cret" not in f"{refused}{down}{wrong}{caplog.text}"
    for key in ("s3cret\nX: y", "s3cr\u00e9t", "s3 cret"):
        with pytest.raises(SiopConfigError, match="printable ASCII") as caught:
            SerperSearchTool({"api_url": url, "api_key": key})
        assert key not in str(caught.value)


def test_a_password_in_the_address_is_in_no_message(scripted_service: Any) -> None:
    url, answers, asked = scripted_service
    answers.append((404, {}))
    address = url.replace("http://", "http://user:pa55@")
    (error,) = search_all(LocalSearchTool({"retrieval_service_url": address}), {"query": "x"})
    assert asked[0]["headers"]["Authorization"].startswith("Basic ")
    assert isinstance(error, SearchRefused) and url in str(error) and "pa55" not in str(error)
