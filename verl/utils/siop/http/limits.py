"""Limits on the requests of a service: how many at once, and the size and time of each body."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is not taken; status, detail and headers are those of its answer."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail)
        self.answer = JSONResponse({"detail": detail}, status, headers)


class Limits:
    """ASGI middleware: bounded bodies, and bounded numbers of POST requests that are worked on and that wait.

    Those that wait have their bodies unread. The application gets the body whole. A request whose client has gone away
    before is dropped.

    Args:
        app: the application.
        max_body_bytes: larger bodies get 413, unread where their length is declared.
        max_concurrency: requests whose bodies are read or worked on at once.
        max_waiting: requests that wait for their turn; more get 503 with ``Retry-After``.
        body_timeout_s: bodies that take longer to arrive get 408.
        unpack: makes of a body and its headers the body for the application, or raises :class:`Refused`.

    Attributes:
        pending: requests that are worked on or wait.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_concurrency: int,
        max_waiting: int,
        body_timeout_s: float,
        unpack: Callable[[bytes, Headers], Awaitable[bytes]] | None = None,
    ) -> None:
        self._app, self._max_body_bytes, self._body_timeout_s = app, max_body_bytes, body_timeout_s
        self._slots, self._max_pending = asyncio.Semaphore(max_concurrency), max_concurrency + max_waiting
        self._unpack = unpack
        self.pending = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self.pending >= self._max_pending:
            detail = f"{self.pending} requests are worked on or wait, the limit is {self._max_pending}"
            logger.warning("refused a request: %s (--max-concurrency)", detail)
            await Refused(503, detail, {"Retry-After": "1"}).answer(scope, receive, send)
            return
        self.pending += 1
        try:
            async with self._slots:
                # No name here holds the body while the application works.
                whole = _replayed(await self._body(scope, receive), receive)
                await self._app(scope, whole, send)
        except Refused as error:
            await error.answer(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self.pending -= 1

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise too_large(self._max_body_bytes)
        body, more = bytearray(), True
        deadline = time.monotonic() + self._body_timeout_s
        while more:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise Refused(408, f"the body did not arrive within {self._body_timeout_s:g} s") from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise too_large(self._max_body_bytes)
            more = message.get("more_body", False)
        return await self._unpack(bytes(body), headers) if self._unpack else bytes(body)


def too_large(max_bytes: int) -> Refused:
    """The refusal of a body over the limit."""
    return Refused(413, f"the body is larger than {max_bytes} bytes (--max-body-mb)")


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
