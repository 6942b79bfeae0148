"""Something that answers as a retriever does, whatever it is asked."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HEALTH = {"status": "healthy", "documents": 9, "corpus_sha256": "71"}


class FakeRetriever:
    """A service in a thread of this process.

    Attributes:
        url: its endpoint, as in RETRIEVER_URL.
        health: the answer of ``/health``; None: there is no such page.
        asked: the bodies of all searches.
    """

    def __init__(self) -> None:
        self.health: Any = HEALTH
        self.asked: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path == "/health" and outer.health is not None
                self._answer(200 if known else 404, outer.health)

            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                hit = {"document": {"id": 1, "contents": "a passage"}, "score": 1.0}
                self._answer(200, {"result": [[hit] for _ in outer.asked[-1]["queries"]]})

            def _answer(self, status: int, content: Any) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/retrieve"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """From then on nobody answers there."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> FakeRetriever:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
