"""What the tests of the tools share."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_search_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests ask the same query twice; those of the cache name a folder of their own."""
    monkeypatch.setenv("SERPER_CACHE_DIR", "")
    monkeypatch.delenv("SERPER_MOCK", raising=False)


@pytest.fixture
def scripted_service() -> Iterator[tuple[str, list[tuple[Any, ...]], list[dict[str, Any]]]]:
    """A real HTTP server that gives the listed (status, JSON[, headers]) answers in turn; it records the requests."""
    answers: list[tuple[Any, ...]] = []
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            asked.append({"path": self.path, "headers": dict(self.headers), "body": json.loads(body)})
            status, answer, *headers = answers.pop(0)
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/retrieve", answers, asked
    server.shutdown()
    server.server_close()
