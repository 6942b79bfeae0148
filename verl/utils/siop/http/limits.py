"""Limits of both services on requests: time and size of the head, time and size of the body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class BodyRefused(Exception):
    """A body that is not taken; the text and ``status`` are those of the answer."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, detail)
        self.status, self.detail = status, detail


def too_large(max_bytes: int) -> str:
    """What a body over the limit is answered."""
    return f"the body is larger than {max_bytes} bytes (--max-body-mb)"


async def read_body(
    scope: MutableMapping[str, Any], receive: Receive, max_bytes: int, timeout_s: float
) -> bytearray | None:
    """The body of an ASGI request; None if the client went away before its end.

    Args:
        scope, receive: as the ASGI application gets them.
        max_bytes: longest body.
        timeout_s: seconds until its end has to be here.

    Raises:
        BodyRefused: 413 for a longer body, unread where its length is declared; 408 for one that takes longer.
    """
    declared = dict(scope["headers"]).get(b"content-length", b"")
    if declared.isdigit() and int(declared) > max_bytes:
        raise BodyRefused(413, too_large(max_bytes))
    body = bytearray()
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            message = await asyncio.wait_for(receive(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise BodyRefused(408, f"the body did not arrive within {timeout_s:g} s") from None
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise BodyRefused(413, too_large(max_bytes))
        if not message.get("more_body"):
            return body


def replayed(body: bytes | bytearray, receive: Receive) -> Receive:
    """An ASGI ``receive`` that gives the whole body at first, and then what ``receive`` gives."""
    whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

    async def replay() -> Message:
        nonlocal whole
        if whole is None:
            return await receive()
        message, whole = whole, None
        return message

    return replay


class TimedHttpProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closes a connection whose request line and headers are not there ``head_timeout_s`` seconds after it was opened.

    The same holds for a later request on the connection, from its first byte. Between requests uvicorn's own
    ``timeout_keep_alive`` holds; the body has a limit of its own.

    An unfinished head of more than about ``max_head_bytes`` gets 400, with both parsers that uvicorn may use: h11 has
    this limit itself, httptools has none.
    """

    head_timeout_s = 30.0
    max_head_bytes = 65_536
    _head_timer: asyncio.TimerHandle | None = None
    _in_head = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.max_head_bytes and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")
        self._time_head()

    def on_message_begin(self) -> None:
        """Called by httptools."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called by httptools."""
        self._in_head = False
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _time_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
