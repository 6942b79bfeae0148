"""A service over HTTP as a verl tool: connections, attempts, and how a failure gets out of verl's loop."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import zlib
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, TypeVar

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.tools.search_config import SearchConfig, check_schema, read_config, shown_url
from verl.utils.siop.errors import ServiceUnavailable, SiopError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_WAIT_S = 5.0
_MAX_CONNECTIONS = 100
MAX_ANSWER_BYTES = 32 * 2**20  # unpacked
_MAX_ERROR_BYTES = 4096


class SearchUnavailable(ServiceUnavailable):
    """The search service did not answer, or kept failing."""

    service = "search"


class SearchRefused(SiopError, RuntimeError):
    """A search service answered, but refused the request or sent something that is not a search result."""


class TransientFailure(Exception):
    """A failure worth another attempt; the text says what happened. Raised inside ``SearchTool`` only."""


class HttpTool(BaseTool):
    """Building one checks its configuration and starts nothing.

    A malformed call is answered to the model, as text. A service that cannot be reached is not: verl turns an exception
    of ``execute`` into a tool result that the model reads, and training would go on over made-up observations.
    ``release`` runs outside of that guard, so a failure of :meth:`call` is raised there once more and ends the rollout.
    """

    tool_name: ClassVar[str]
    config_class: ClassVar[type[SearchConfig]]
    trust_env: ClassVar[bool] = True  # HTTP_PROXY and the like hold for this service

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema) -> None:
        self.settings = read_config(self.config_class, self.tool_name, config)
        check_schema(self.tool_name, tool_schema)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the schema, in every process
            super().__init__(config, tool_schema)
        self._failures: dict[str, Exception] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None
        self._reported = False

    @property
    def address(self) -> str:
        """The service's URL, for messages."""
        raise NotImplementedError

    def note_failure(self, instance_id: str, error: Exception) -> None:
        """Keep it for ``release``; the first one goes to the log."""
        self._failures[instance_id] = error
        if not self._reported:
            self._reported = True
            logger.error("%s: %s: %s", self.tool_name, type(error).__name__, error)

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """Forgets the call.

        Raises:
            SearchUnavailable, SearchRefused or another error: the call failed with it.
        """
        failure = self._failures.pop(instance_id, None)
        if failure is not None:
            raise failure

    async def aclose(self) -> None:
        """Closes the pooled connections of the running loop."""
        http, loop = self._http, self._loop
        self._http = self._loop = self._slots = None
        if http is not None and loop is asyncio.get_running_loop():
            await http.aclose()

    async def call(self, fetch: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        """What ``fetch`` returns, which is tried again after a :class:`TransientFailure`.

        Raises:
            SearchUnavailable: no answer after all attempts.
        """
        attempts = self.settings.max_retries + 1
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientFailure),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(multiplier=0.2, max=_MAX_WAIT_S) + wait_random(0, 0.2),
            reraise=True,
        )
        try:
            return await retrying(self._attempt, fetch)
        except TransientFailure as error:
            raise SearchUnavailable(self.address, attempts, str(error)) from error

    async def _attempt(self, fetch: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        http, slots = self._connection()
        async with slots:
            try:
                # httpx's own limits are for each read: a server that sends a byte now and then would hold us for ever.
                return await asyncio.wait_for(fetch(http), self.settings.timeout_s)
            except asyncio.TimeoutError as error:
                raise TransientFailure(f"no answer within {self.settings.timeout_s:g} s") from error

    def _connection(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if self._http is None or self._slots is None or self._loop is not loop:
            # Connections of another loop cannot be used, nor closed, from here.
            self._loop = loop
            self._slots = asyncio.Semaphore(_MAX_CONNECTIONS)
            self._http = httpx.AsyncClient(
                timeout=None,  # _attempt limits it
                headers={"Accept-Encoding": "gzip"},
                limits=httpx.Limits(max_connections=_MAX_CONNECTIONS),
                trust_env=self.trust_env,
            )
        return self._http, self._slots


async def post(client: httpx.AsyncClient, url: str, secret: str = "", **kwargs: Any) -> Any:
    """POST, and the JSON of the answer.

    Args:
        client: the connections.
        url: the address.
        secret: text that no message may show, in case that the service repeats it.
        **kwargs: for httpx.

    Raises:
        TransientFailure: no connection, a garbled answer, HTTP 429 or 5xx.
        SearchRefused: another HTTP error, no JSON, or more than ``MAX_ANSWER_BYTES``.
    """

    def shown(text: str, size: int) -> str:
        return (text.replace(secret, "[secret]") if secret else text)[:size]

    try:
        async with client.stream("POST", url, **kwargs) as response:
            body = await _read(response, MAX_ANSWER_BYTES if response.is_success else _MAX_ERROR_BYTES)
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise TransientFailure(shown(f"{type(error).__name__}: {error}".rstrip(": "), 500)) from error
    status, text = response.status_code, body[:_MAX_ERROR_BYTES].decode("utf-8", "replace")
    if status == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
        raise TransientFailure(f"HTTP {status}: {shown(text, 200)}")
    if not response.is_success:
        raise SearchRefused(f"{shown_url(url)} refused the search with HTTP {status}: {shown(text, 500)}")
    if len(body) > MAX_ANSWER_BYTES:
        raise SearchRefused(
            f"{shown_url(url)} answered with more than {MAX_ANSWER_BYTES:,} bytes (unpacked), the most that is read"
        )
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise SearchRefused(
            f"{shown_url(url)} answered with something that is not JSON: {shown(text, 200)!r}"
        ) from error


async def _read(response: httpx.Response, limit: int) -> bytes:
    """The unpacked body, or a little more than ``limit`` bytes of it.

    Raises:
        httpx.DecodingError: it is packed in another way than asked for, or damaged.
    """
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip"):
        raise httpx.DecodingError(f"Content-Encoding {encoding!r:.50}; only gzip was asked for")
    # By hand: httpx unpacks whatever comes, at once.
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS) if encoding == "gzip" else None
    body = bytearray()
    async for chunk in response.aiter_raw():
        try:
            body += unpacker.decompress(chunk, limit + 1 - len(body)) if unpacker else chunk
        except zlib.error as error:
            raise httpx.DecodingError(str(error)) from error
        if len(body) > limit:
            return bytes(body)
    if unpacker and not unpacker.eof:
        raise httpx.DecodingError("the gzip stream ends too early")
    return bytes(body)
