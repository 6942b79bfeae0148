"""Several retrievers behind one search tool."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import pytest
from scorer_process import free_port
from search_calls import search_all
from verl.tools import local_search_tool
from verl.tools.http_tool import SearchUnavailable
from verl.tools.local_search_tool import LocalSearchTool
from verl.trainer.siop.checks.services import check_search
from verl.utils.siop.errors import SiopConfigError


class Replica:
    """A retriever that finds its own name, after ``seconds``; it counts its searches and those open at once."""

    def __init__(self, name: str, seconds: float, status: int) -> None:
        self.name, self.seconds, self.status = name, seconds, status
        self.searches = self.open = self.most_open = 0
        self.url = ""


@contextmanager
def replicas(*made: Replica) -> Iterator[str]:
    """Their addresses, with commas between."""
    with ExitStack() as stack:
        for replica in made:
            server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(replica))
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            Thread(target=server.serve_forever, daemon=True).start()
            replica.url = f"http://127.0.0.1:{server.server_port}/retrieve"
        yield ", ".join(replica.url for replica in made)


def _handler(replica: Replica) -> type[BaseHTTPRequestHandler]:
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            with lock:
                replica.searches += 1
                replica.open += 1
                replica.most_open = max(replica.most_open, replica.open)
            time.sleep(replica.seconds)
            with lock:
                replica.open -= 1
            self.send_response(replica.status)
            self.end_headers()
            self.wfile.write(json.dumps({"result": [[{"document": {"contents": replica.name}, "score": 1}]]}).encode())

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


def test_searches_go_to_the_replica_with_the_fewest_open_ones() -> None:
    # So slow that a busy machine too is done before it answers.
    fast, slow = Replica("fast", 0.02, 200), Replica("slow", 4.0, 200)
    with replicas(fast, slow) as urls:
        tool = LocalSearchTool({"retrieval_service_url": urls})
        few = asyncio.Semaphore(3)

        async def search(number: int) -> str:
            async with few:
                response, _, _ = await tool.execute(str(number), {"query": "x"})
            return response.text or ""

        async def run() -> list[str]:
            found = await asyncio.gather(*map(search, range(30)))
            await tool.aclose()
            return found

        found = asyncio.run(run())
    assert len(found) == fast.searches + slow.searches == 30
    assert slow.searches <= 10 and slow.searches == slow.most_open


def test_searches_at_once_are_spread() -> None:
    made = [Replica(name, 0.3, 200) for name in "abc"]
    with replicas(*made) as urls:
        search_all(LocalSearchTool({"retrieval_service_url": urls}), *[{"query": "x"}] * 9)
    assert [replica.searches for replica in made] == [3, 3, 3]


@pytest.mark.parametrize("failing", [503, None])
def test_a_replica_that_fails_is_left_alone_for_a_while(failing: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_search_tool, "REST_S", 600.0)  # the test may take more than ten seconds
    good, bad = Replica("good", 0, 200), Replica("bad", 0, failing or 200)
    with replicas(good, bad) as urls:
        if failing is None:
            urls = f"{good.url},http://127.0.0.1:{free_port()}/retrieve"
        tool = LocalSearchTool({"retrieval_service_url": urls, "max_retries": 1})
        for _ in range(20):
            assert search_all(tool, {"query": "x"}, close=False)[0][0] == "[1] good"
        assert good.searches == 20 and bad.searches <= 1
        # All of them fail: they are asked all the same.
        bad.status = good.status = 503
        assert isinstance(search_all(tool, {"query": "x"}, close=False)[0], SearchUnavailable)
        good.status = 200
        assert search_all(tool, {"query": "x"})[0][0] == "[1] good"


def test_a_replica_that_has_rested_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_search_tool, "REST_S", 0.0)
    good, bad = Replica("good", 0, 200), Replica("bad", 0, 503)
    with replicas(good, bad) as urls:
        tool = LocalSearchTool({"retrieval_service_url": urls, "max_retries": 9})
        search_all(tool, *[{"query": "x"}] * 4, close=False)
        failed, bad.status = bad.searches, 200
        search_all(tool, *[{"query": "x"}] * 4)
    assert failed >= 1 and bad.searches > failed


def test_a_slow_replica_is_left_alone_too() -> None:
    good, slow = Replica("good", 0, 200), Replica("slow", 3, 200)
    with replicas(good, slow) as urls:
        tool = LocalSearchTool({"retrieval_service_url": urls, "timeout_s": 0.5, "max_retries": 1})
        for _ in range(12):
            assert search_all(tool, {"query": "x"}, close=False)[0][0] == "[1] good"
    assert slow.searches <= 1


def _check(tool: LocalSearchTool, warn: Callable[[str], None]) -> str:
    return asyncio.run(check_search({"search": tool}, "sample", warn, 10))


def test_the_check_before_a_run_asks_every_replica() -> None:
    warnings: list[str] = []
    one, same, other = Replica("a", 0, 200), Replica("a", 0, 200), Replica("b", 0, 200)
    with replicas(one, same, other) as urls:
        found = _check(LocalSearchTool({"retrieval_service_url": f"{one.url},{same.url}"}), warnings.append)
        assert one.url in found and same.url in found and not warnings
        _check(LocalSearchTool({"retrieval_service_url": urls}), warnings.append)
        assert len(warnings) == 1 and "must serve one index" in warnings[0]
        nowhere = f"http://127.0.0.1:{free_port()}/retrieve"
        with pytest.raises(SearchUnavailable, match=nowhere):
            _check(LocalSearchTool({"retrieval_service_url": f"{one.url},{nowhere}", "max_retries": 0}), print)


def test_every_address_is_checked_when_the_tool_is_built() -> None:
    with pytest.raises(SiopConfigError, match=r"retrieval_service_url must be an http.* got '10\.0\.0\.2:8000'"):
        LocalSearchTool({"retrieval_service_url": "http://10.0.0.1:8000/retrieve,10.0.0.2:8000"})
    tool = LocalSearchTool({"retrieval_service_url": "http://u:p@a/retrieve, http://b/retrieve,http://b/retrieve"})
    assert tool.address == "http://a/retrieve, http://b/retrieve"
