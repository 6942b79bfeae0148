"""What stands before the endpoints: ASGI middleware with the checks and counts that hold for every request."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from verl.utils.siop.http.content import content_digest, decompress, is_intact
from verl.utils.siop.http.limits import Limits, Refused, too_large
from verl.utils.siop.http.packed import MEDIA_TYPE
from verl.utils.siop.scorer.metrics import Metrics

logger = logging.getLogger("siop.scorer")

PATHS = ("/health", "/support", "/score", "/cluster", "/nli_score", "/metrics")  # that are counted by themselves
OFFER = f"application/json, {MEDIA_TYPE}".encode()
UNAUTHORIZED = JSONResponse({"detail": "missing or wrong bearer token"}, 401, {"WWW-Authenticate": "Bearer"})


class Guard:
    """Request ids, digests, access log, metrics, bearer token, body limit and concurrency limit.

    A body that does not match its ``Content-Digest`` (RFC 9530) gets 400; answers carry one. Bodies may come with
    ``Content-Encoding: gzip`` (RFC 7694) or as MessagePack (RFC 9110 section 12.5.1): every answer offers both.

    Args:
        app: the application.
        metrics: where to count.
        max_body_bytes: larger bodies get 413, unread where their length is declared.
        max_concurrency: POST requests beyond this many at once get 503 with ``Retry-After``.
        token: expected bearer token, None for no check. ``/health`` is always open.
        body_timeout_s: bodies that take longer to arrive get 408.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_body_bytes: int,
        max_concurrency: int,
        token: str | None = None,
        body_timeout_s: float = 60.0,
    ) -> None:
        self._metrics, self._max_body_bytes, self._token = metrics, max_body_bytes, token
        self._app = Limits(app, max_body_bytes, max_concurrency, 0, body_timeout_s, self._unpack)
        metrics.in_flight.set_function(lambda: self._app.pending)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given) else uuid.uuid4().hex[:12]
        status = 499  # that of a client that went away before its answer
        start: Message | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status, start
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = {b"x-request-id": request_id.encode(), b"accept-encoding": b"gzip", b"accept": OFFER}
                start = {**message, "headers": [*message["headers"], *ours.items()]}
                return
            if start is not None:  # held until the body is here, for its digest
                if not message.get("more_body"):
                    start["headers"].append((b"content-digest", content_digest(message.get("body", b"")).encode()))
                await send(start)
                start = None
            await send(message)

        try:
            app = self._app if self._is_authorized(scope) else UNAUTHORIZED
            await app(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - started
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(seconds)
            level = logging.DEBUG if path in ("/health", "/metrics") else logging.INFO
            logger.log(
                level, "%s %r %d %.0f ms id=%s", scope["method"], scope["path"], status, 1000 * seconds, request_id
            )

    def _is_authorized(self, scope: Scope) -> bool:
        if self._token is None or scope["path"] == "/health":
            return True
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode("latin-1"), f"Bearer {self._token}".encode())

    async def _unpack(self, body: bytes, headers: Headers) -> bytes:
        # In a thread, as the parsing: a digest of 64 MB takes a while.
        if not await asyncio.to_thread(is_intact, body, headers.get("content-digest")):
            raise Refused(400, "the body does not match its Content-Digest")
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding == "identity":
            return body
        if encoding != "gzip":
            raise Refused(415, f"Content-Encoding is {encoding[:40]!r}; gzip and identity are taken")
        try:
            plain = await asyncio.to_thread(decompress, body, self._max_body_bytes)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        if plain is None:
            raise too_large(self._max_body_bytes)
        return plain
