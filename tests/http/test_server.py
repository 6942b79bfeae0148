"""Connections that do not finish the head of a request are closed, all others are served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from verl.utils.siop.http.server import TimedHttpProtocol, bind, is_exposed

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


async def app(scope, receive, send) -> None:
    """Answers with the body, 0.6 seconds after its end."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await asyncio.sleep(0.6)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    ("host", "exposed"), [("127.0.0.1", False), ("127.0.0.2", False), ("localhost", False), ("0.0.0.0", True)]
)
def test_whether_other_machines_reach_a_socket(host: str, exposed: bool) -> None:
    with bind(host, 0, listen=False) as sock:
        assert is_exposed(sock) == exposed


def served(talk: Callable[[Stream], Awaitable[None]]) -> float:
    """Seconds that ``talk`` took on a connection to a server with a limit of 0.3 seconds for a head."""

    class Protocol(TimedHttpProtocol):
        head_timeout_s = 0.3

    async def run() -> float:
        server = uvicorn.Server(uvicorn.Config(app, port=0, http=Protocol, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        stream = await asyncio.open_connection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])
        started = time.monotonic()
        await asyncio.wait_for(talk(stream), 30)
        seconds = time.monotonic() - started
        stream[1].close()
        server.should_exit = True
        await serving
        return seconds

    return asyncio.run(run())


async def answer(stream: Stream) -> bytes:
    head = await stream[0].readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    return await stream[0].readexactly(2)


@pytest.mark.parametrize("start", [b"", b"POST / HT", REQUEST[:-2]])
def test_an_unfinished_head_is_not_waited_for(start):
    async def talk(stream: Stream) -> None:
        stream[1].write(start)
        assert await stream[0].read() == b""

    assert served(talk) >= 0.29


def test_bytes_that_trickle_do_not_prolong_it():
    async def talk(stream: Stream) -> None:
        closed = asyncio.create_task(stream[0].read())
        for byte in REQUEST[:-2]:
            stream[1].write(bytes([byte]))
            if (await asyncio.wait({closed}, timeout=0.1))[0]:
                return
        raise AssertionError("the connection was kept")

    served(talk)


def test_a_slow_body_and_a_slow_answer_are_waited_for():
    async def talk(stream: Stream) -> None:
        for _ in range(2):
            stream[1].write(REQUEST + b"o")
            await asyncio.sleep(0.6)
            stream[1].write(b"k")
            assert await answer(stream) == b"ok"

    assert served(talk) >= 2.4


def test_the_head_of_a_later_request_is_limited_too():
    async def talk(stream: Stream) -> None:
        stream[1].write(REQUEST + b"ok")
        assert await answer(stream) == b"ok"
        stream[1].write(REQUEST[:10])
        assert await stream[0].read() == b""

    assert served(talk) >= 0.89
