"""HTTP proxy that spoils what passes through it, for the tests of the scoring client."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

Json = Any


def _replace_first_score(value: Any) -> Callable[[Json], Json]:
    def edit(data: Json) -> Json:
        data["support"][0][0][0] = value
        return data

    return edit


def _without(*path: int) -> Callable[[Json], Json]:
    def edit(data: Json) -> Json:
        inner = data["support"]
        for index in path:
            inner = inner[index]
        inner.pop()
        return data

    return edit


# Answers to /support that are still valid JSON (as Python reads it), with a status of 200 and no digest.
EDITS: dict[str, Callable[[Json], Json]] = {
    "nan": _replace_first_score(float("nan")),
    "infinity": _replace_first_score(float("-inf")),
    "null": _replace_first_score(None),
    "text": _replace_first_score("-1.5"),
    "boolean": _replace_first_score(True),
    "nested": _replace_first_score([-1.5]),
    "positive": _replace_first_score(1.5),
    "huge": _replace_first_score(-(10**400)),
    "rollout_missing": _without(),
    "boundary_missing": _without(0),
    "reference_missing": _without(0, 0),
    "no_support": lambda data: {"computed_tokens": 1},
    "list": lambda data: data["support"],
    "no_json": lambda data: data,
}
# What can happen to any message; the digests stay as they were sent.
TRANSPORT = ("refuse", "drop", "hang", "trickle", "truncate", "shorten", "flip", "digit", "request_digit", "stale")
STATUS = {"502": "502 Bad Gateway", "503": "503 Service Unavailable", "504": "504 Gateway Timeout"}


class FaultyProxy:
    """Forwards every POST, one connection each, and spoils every ``every``-th of them by the next of ``faults``.

    Use it as ``with FaultyProxy(...) as proxy:``; it runs in a thread of its own.

    Args:
        upstream: port of the server on 127.0.0.1.
        faults: names out of ``EDITS``, ``TRANSPORT`` and ``STATUS``, or ``flip_anywhere``, taken in turn; None spoils
            nothing.
        every: 1 spoils all, 0 none.
        retry_after: header of the 503.
        together: the first requests wait until so many are open, and half a second more for one more to come.

    Attributes:
        spoiled: how often each fault happened.
        arrivals: times at which each request (by its id) arrived.
        most_open: most requests that were open at once.
    """

    def __init__(
        self,
        upstream: int,
        faults: Sequence[str | None] = (None,),
        every: int = 1,
        retry_after: str = "",
        together: int = 1,
    ) -> None:
        self._upstream, self._every, self._retry_after = upstream, every, retry_after
        self._faults, self._random = itertools.cycle(faults), random.Random(0)
        self._stale: bytes | None = None
        self._together, self._gate = together, asyncio.Event()
        self.requests = 0
        self.arrivals: dict[str, list[float]] = {}
        self.spoiled: Counter[str] = Counter()
        self.open = self.most_open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self.url = f"http://127.0.0.1:{server.result(10).sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.I)
            body = await reader.readexactly(int(length[1])) if length else b""
            self.requests += 1
            if request_id := re.search(rb"(?i)x-request-id: *(\S+)", head):
                self.arrivals.setdefault(request_id[1].decode(), []).append(time.monotonic())
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            try:
                fault = next(self._faults) if self.requests % self._every == 0 else None
                if self.open >= self._together:
                    self._loop.call_later(0.5 if self._together > 1 else 0, self._gate.set)
                await self._gate.wait()
                answer = await self._exchange(head, body, fault)
            finally:
                self.open -= 1
            if answer is None:
                writer.transport.abort()
            elif fault == "trickle":
                for byte in answer:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.2)
            else:
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the test has ended
        finally:
            writer.close()

    async def _exchange(self, head: bytes, body: bytes, fault: str | None) -> bytes | None:
        """Raw answer to give, None for none."""
        if fault is not None:
            self.spoiled[fault] += 1
        if fault == "refuse":
            return None
        if fault in STATUS:
            extra = f"Retry-After: {self._retry_after}\r\n" if self._retry_after else ""
            return f"HTTP/1.1 {STATUS[fault]}\r\n{extra}Content-Length: 4\r\nConnection: close\r\n\r\nbusy".encode()
        if fault == "request_digit":
            body = self._other_digit(body)
        raw = await self._forward(head, body)
        split = raw.index(b"\r\n\r\n") + 4
        answer_head, answer_body = raw[:split], raw[split:]
        if fault is None:
            self._stale = raw
        elif fault == "drop":
            return None
        elif fault == "hang":
            await asyncio.sleep(3600)
        elif fault == "truncate":
            return raw[: self._random.randrange(1, len(raw))]
        elif fault == "shorten":
            return _with_body(answer_head, answer_body[: len(answer_body) // 2])
        elif fault == "flip":
            return answer_head + self._other_bit(answer_body)
        elif fault == "flip_anywhere":
            return self._other_bit(raw)
        elif fault == "digit":
            return answer_head + self._other_digit(answer_body)
        elif fault == "stale":
            return self._stale
        elif fault in EDITS:
            answer_head = re.sub(rb"(?i)content-digest:[^\r]*\r\n", b"", answer_head)
            edited = json.dumps(EDITS[fault](json.loads(answer_body))).encode()
            return _with_body(answer_head, edited if fault != "no_json" else edited.replace(b'"', b"'"))
        return raw

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            writer.write(re.sub(rb"(?i)connection: keep-alive", b"Connection: close", head) + body)
            return await reader.read()
        finally:
            writer.close()

    def _other_bit(self, message: bytes) -> bytes:
        at = self._random.randrange(len(message))
        return message[:at] + bytes([message[at] ^ 1 << self._random.randrange(8)]) + message[at + 1 :]

    def _other_digit(self, message: bytes) -> bytes:
        """Another digit behind a digit: the number stays a number of the same length."""
        at = self._random.choice([match.start() for match in re.finditer(rb"(?<=\d)\d", message)])
        digit = (message[at] - ord("0") + self._random.randrange(1, 10)) % 10
        return message[:at] + b"%d" % digit + message[at + 1 :]


def _with_body(head: bytes, body: bytes) -> bytes:
    return re.sub(rb"(?i)content-length: *\d+", b"content-length: %d" % len(body), head) + body
