"""A scorer that takes its time, for benchmarks: passes everything on, support after a pause for each rollout."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from verl.utils.siop.http.packed import is_packed, spans
from verl.utils.siop.scorer.wire import MAX_ITEMS

_TIMEOUT_S = 600.0
_HOP = ("host", "connection", "content-length", "transfer-encoding")


@contextlib.contextmanager
def slow_scorer(url: str, seconds: float) -> Iterator[str]:
    """The address of a scorer that needs ``seconds`` for each rollout, one request after the other, as one GPU would.

    Args:
        url: the scorer behind it.
        seconds: of each rollout of ``POST /support``, on top of what the scorer needs.
    """
    turn = asyncio.Lock()

    async def forward(request: Request) -> Response:
        body = await request.body()
        async with contextlib.AsyncExitStack() as stack:
            if request.url.path == "/support":
                await stack.enter_async_context(turn)
                text = gzip.decompress(body) if request.headers.get("content-encoding") == "gzip" else body
                packed = is_packed(request.headers.get("content-type"))
                rollouts = spans(text, "rollouts", MAX_ITEMS) if packed else json.loads(text)["rollouts"]
                await asyncio.sleep(seconds * len(rollouts or ()))
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=_TIMEOUT_S))
            headers = {name: value for name, value in request.headers.items() if name not in _HOP}
            answer = await client.request(request.method, url + request.url.path, content=body, headers=headers)
        kept = {name: value for name, value in answer.headers.items() if name not in _HOP}
        return Response(answer.content, answer.status_code, kept)

    app = Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])])
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
