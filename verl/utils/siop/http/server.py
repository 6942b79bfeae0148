"""The port of a service and the limits on request heads: bound sockets, and uvicorn's configuration."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from verl.utils.siop.errors import SiopConfigError

MAX_HEAD_BYTES = 65_536


class TimedHttpProtocol(H11Protocol):
    """Closes a connection whose request line and headers are not there ``head_timeout_s`` seconds after it was opened.

    The same holds for a later request on the connection, from its first byte. Between requests uvicorn's own
    ``timeout_keep_alive`` holds; the body has a limit of its own. uvicorn has no such limit, and connections that never
    finish their head would stay open for ever.
    """

    head_timeout_s = 30.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

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


def uvicorn_config(app: ASGIApp, grace_s: int) -> uvicorn.Config:
    """Configuration of a service that logs its requests itself.

    Args:
        app: the ASGI application.
        grace_s: seconds that what is in flight at shutdown may take.
    """
    return uvicorn.Config(
        app,
        http=TimedHttpProtocol,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=grace_s,
    )


def bind(host: str, port: int, *, listen: bool) -> socket.socket:
    """Takes a port before the slow part of a start, so that a busy one is known at once.

    Args:
        host: name or address; its first address is taken.
        port: 0 for any free one.
        listen: let clients connect, and wait for an answer, from now on. Otherwise they are refused until the server
            runs, and a second server that does not listen yet may take the same port.

    Raises:
        SiopConfigError: the port is in use, or the address is not one of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        # Only connections that wait to expire are no obstacle; a listener is.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        if listen:
            sock.listen()
    except (OSError, OverflowError) as error:
        raise SiopConfigError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    return sock


def is_exposed(sock: socket.socket) -> bool:
    """Whether other machines may reach a bound socket: its address is not one of this machine's own (loopback)."""
    return not ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback
