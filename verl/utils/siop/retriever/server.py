"""Retriever service with Search-R1's wire format.

    python -m verl.utils.siop.retriever.server --corpus corpus.jsonl

    POST /retrieve {"queries": ["who founded ..."], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id": "...", "contents": "..."}, "score": 7.1}]]}
    GET /health -> {"status": "healthy", "documents": 3160}

With "return_scores" false (the default) a hit is the document alone. A query gets fewer than "topk" hits when fewer
documents share a word with it. Bad input gets 422 with the name of the field, a body over --max-body-mb 413, one that
does not arrive in time 408. Requests over --max-concurrency wait for their turn; if a thousand do, more get 503.

The corpus has one JSON object per line with "id" and "contents". The index is built once and kept in a folder next to
the corpus; it is built again when the corpus has changed.
"""

# No `from __future__ import annotations`: FastAPI could not resolve the request class defined in `create_app`.
import argparse
import asyncio
import json
import logging
import math
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from verl.utils.siop.errors import SiopError
from verl.utils.siop.http.limits import BodyRefused, Receive, TimedHttpProtocol, read_body, replayed
from verl.utils.siop.retriever.bm25 import Bm25Index, Index

logger = logging.getLogger("siop.retriever")

MAX_TOPK = 100
MAX_BODY_MB = 16.0  # twice the longest that the other limits allow in UTF-8
MAX_CONCURRENCY = 32  # fewer than FastAPI's 40 threads
MAX_WAITING = 1024
BODY_TIMEOUT_S = 30.0
GRACE_S = 10  # what is in flight at shutdown may take this long
MAX_SHOWN_ERRORS = 20

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Limits:
    """ASGI middleware: bounded bodies, and bounded numbers of requests that are worked on and that wait.

    Those that wait have their bodies unread. Whose client has gone away by its turn is dropped.

    Args:
        app: the application.
        max_body_bytes: larger bodies get 413, unread where their length is declared.
        max_concurrency: POST requests whose bodies are read or searched for at once.
        max_waiting: POST requests that wait for their turn; more get 503 with ``Retry-After``.
        body_timeout_s: bodies that take longer to arrive get 408.
    """

    def __init__(
        self, app: Any, max_body_bytes: int, max_concurrency: int, max_waiting: int, body_timeout_s: float
    ) -> None:
        self._app, self._max_body_bytes, self._body_timeout_s = app, max_body_bytes, body_timeout_s
        self._slots, self._max_pending = asyncio.Semaphore(max_concurrency), max_concurrency + max_waiting
        self._pending = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._pending >= self._max_pending:
            detail = f"{self._pending} requests are worked on or wait, the limit is {self._max_pending}"
            logger.warning("refused a request: %s (--max-concurrency)", detail)
            response = JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "1"})
            await response(scope, receive, send)
            return
        self._pending += 1
        try:
            async with self._slots:
                await self._with_body(scope, receive, send)
        finally:
            self._pending -= 1

    async def _with_body(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self._max_body_bytes, self._body_timeout_s)
        except BodyRefused as error:
            await JSONResponse({"detail": error.detail}, status_code=error.status)(scope, receive, send)
            return
        if body is None:
            return
        replay = replayed(body, receive)
        del body
        await self._app(scope, replay, send)


def create_app(
    index: Index,
    *,
    topk: int = 3,
    max_queries: int = 512,
    max_topk: int = MAX_TOPK,
    max_query_chars: int = 4096,
    max_body_mb: float = MAX_BODY_MB,
    max_concurrency: int = MAX_CONCURRENCY,
    max_waiting: int = MAX_WAITING,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> FastAPI:
    """The service over any ``Index``.

    Args:
        index: answers the searches.
        topk: hits per query when a request does not say.
        max_queries, max_topk, max_query_chars: limits of a request; beyond them it gets 422.
        max_body_mb, max_concurrency, max_waiting, body_timeout_s: see :class:`Limits`.
    """

    class RetrieveRequest(BaseModel):
        model_config = ConfigDict(extra="forbid")

        queries: list[Annotated[StrictStr, Field(max_length=max_query_chars)]] = Field(
            min_length=1, max_length=max_queries
        )
        topk: StrictInt | None = Field(default=None, ge=1, le=max_topk)
        return_scores: StrictBool = False

    app = FastAPI(title="SIOP retriever")
    app.add_middleware(
        Limits,
        max_body_bytes=int(max_body_mb * 2**20),
        max_concurrency=max_concurrency,
        max_waiting=max_waiting,
        body_timeout_s=body_timeout_s,
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # Without pydantic's echo of the input, which may be long, or nothing that JSON can hold.
        detail = [
            {"type": e["type"], "loc": [p[:100] if isinstance(p, str) else p for p in e["loc"]], "msg": e["msg"][:500]}
            for e in error.errors()[:MAX_SHOWN_ERRORS]
        ]
        return Response(json.dumps({"detail": detail}), status_code=422, media_type="application/json")

    # Async: no thread of the searches' pool is needed for it.
    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "healthy", "documents": len(index)}

    # Not async: FastAPI runs it in its thread pool, so that a long search does not hold up /health.
    @app.post("/retrieve")
    def retrieve(request: RetrieveRequest) -> dict[str, Any]:
        hits = index.search(request.queries, request.topk or topk)
        if request.return_scores:
            return {"result": [[{"document": d, "score": score} for d, score in found] for found in hits]}
        return {"result": [[d for d, _ in found] for found in hits]}

    return app


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, got {text!r}")
    return int(text)


def _topk(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_TOPK:
        raise argparse.ArgumentTypeError(f"topk is a number from 1 to {MAX_TOPK}, got {text!r}")
    return int(text)


def _max_body_mb(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"max-body-mb is a number above 0, got {text!r}")
    return value


def _max_concurrency(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"max-concurrency is a number from 1, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is stopped; the exit status is not zero if it could not start."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.siop.retriever.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", type=Path, required=True, help="JSONL file, one passage per line")
    parser.add_argument("--index", type=Path, help="folder of the index (default: CORPUS with .bm25 appended)")
    parser.add_argument("--port", type=_port, default=8000, help="port, 0 for any free one (default: 8000)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--topk", type=_topk, default=3, help="hits per query when a request does not say (default: 3)")
    parser.add_argument(
        "--max-body-mb",
        type=_max_body_mb,
        default=MAX_BODY_MB,
        help="largest request body; more get 413 (default: %(default)g)",
    )
    parser.add_argument(
        "--max-concurrency",
        type=_max_concurrency,
        default=MAX_CONCURRENCY,
        help=f"requests at once; {MAX_WAITING} more wait, beyond them 503 with Retry-After (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    index_dir = args.index or args.corpus.with_name(args.corpus.name + ".bm25")
    try:
        listener = _bind(args.host, args.port)
        index = Bm25Index.open(args.corpus, index_dir)
    except (SiopError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    host, port = listener.getsockname()[:2]
    logger.info("serving %d documents of %s at http://%s:%d/retrieve", len(index), args.corpus, host, port)
    app = create_app(index, topk=args.topk, max_body_mb=args.max_body_mb, max_concurrency=args.max_concurrency)
    config = uvicorn.Config(
        app, http=TimedHttpProtocol, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _bind(host: str, port: int) -> socket.socket:
    """Takes the port before the index is built, so that a busy one is known at once. It does not listen yet.

    Raises:
        SiopError: the port is in use, or the address is not one of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise SiopError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


if __name__ == "__main__":
    # force: importing verl has configured the root logger, at WARNING.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr, force=True)
    sys.exit(main())
