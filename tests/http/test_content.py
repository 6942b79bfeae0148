"""Compressed request bodies: offered by the service, used by the client, bounded and checked."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from verl.utils.siop.http.content import compress, content_digest, decompress, offers_gzip
from verl.utils.siop.scorer.guard import Guard
from verl.utils.siop.scorer.metrics import Metrics
from verl.utils.siop.scoring_client import ScoringClient

MAX_BODY_BYTES = 1000


class Pool:
    """What the metrics read."""

    num_workers = num_up = num_nli_workers = num_nli_up = 0


async def echo(scope, receive, send):
    """Answers with the body that arrives behind the guard."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def post(content: bytes, **headers: str) -> httpx.Response:
    async def ask():
        guard = Guard(echo, Metrics(Pool()), MAX_BODY_BYTES, 1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://scorer") as http:
            return await http.post("/support", content=content, headers=headers)

    return asyncio.run(ask())


def test_the_service_offers_and_unpacks_gzip():
    answer = post(b"[1]")
    assert (answer.status_code, answer.content) == (200, b"[1]")
    assert offers_gzip(answer.headers)
    body = compress(b"7" * MAX_BODY_BYTES)
    digest = content_digest(body)
    for encoding in ("gzip", "GZIP"):
        answer = post(body, **{"Content-Encoding": encoding, "Content-Digest": digest})
        assert (answer.status_code, answer.content) == (200, b"7" * MAX_BODY_BYTES)


@pytest.mark.parametrize(
    ("content", "encoding", "status"),
    [
        (compress(b"7" * (MAX_BODY_BYTES + 1)), "gzip", 413),
        (compress(b"0" * 1_000_000)[:900], "gzip", 413),
        (b"[1]", "gzip", 400),
        (compress(b"[1]")[:-1], "gzip", 400),
        (compress(b"[1]") + b"x", "gzip", 400),
        (b"", "gzip", 400),
        (b"[1]", "br", 415),
    ],
)
def test_bodies_that_cannot_be_unpacked_are_refused(content, encoding, status):
    assert post(content, **{"Content-Encoding": encoding}).status_code == status


def test_unpacking_stops_at_the_limit():
    assert decompress(compress(b"ab"), 2) == b"ab"
    assert decompress(compress(b"abc"), 2) is None


@pytest.mark.parametrize("offer", [True, False])
def test_the_client_compresses_large_bodies_for_a_server_that_offers_it(offer):
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            encoding = self.headers["Content-Encoding"]
            assert self.headers["Content-Digest"] == content_digest(content)
            pairs = json.loads(gzip.decompress(content) if encoding else content)["pairs"]
            seen.append((encoding, len(content)))
            answer = json.dumps({"scores": [0.5] * len(pairs)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            if offer:
                self.send_header("Accept-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    async def ask():
        async with ScoringClient(f"http://127.0.0.1:{server.server_port}", attempts=1, timeout_s=20) as client:
            for pairs in ([("p", "h")], [("p", "h")], [("premise " * 400, "h")]):
                assert await client.entailment(pairs) == [0.5]

    try:
        asyncio.run(ask())
    finally:
        server.shutdown()
        server.server_close()
    assert [encoding for encoding, _ in seen] == [None, None, "gzip" if offer else None]
    assert seen[0][1] < 100 and (seen[2][1] < 200 if offer else seen[2][1] > 3000)
