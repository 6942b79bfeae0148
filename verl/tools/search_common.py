"""What the search tools share: reading their configuration, the model's arguments and the text of a result."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.utils.siop.errors import ServiceUnavailable, SiopConfigError, SiopError

logger = logging.getLogger(__name__)

NOTHING_FOUND = "nothing found"
SEARCH_SCHEMA = OpenAIFunctionToolSchema.model_validate(
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Searches for passages about a query and returns the best ones.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string", "description": "What to look for, in a few words."}},
                "required": ["query"],
            },
        },
    }
)
MAX_QUERY_CHARS = 4096  # the retriever's limit
_MAX_WAIT_S = 5.0
_MAX_CONNECTIONS = 100


class SearchUnavailable(ServiceUnavailable):
    """The search service did not answer, or kept failing."""

    service = "search"


class SearchRefused(SiopError, RuntimeError):
    """A search service answered, but refused the request or sent something that is not a search result."""


class TransientFailure(Exception):
    """A failure worth another attempt; the text says what happened. Raised inside ``SearchTool`` only."""


class InvalidQuery(ValueError):
    """The model's arguments are unusable; the text is shown to the model."""


@dataclass(frozen=True)
class SearchConfig:
    """Keys that every search tool takes.

    Args:
        topk: passages per search.
        timeout_s: seconds for one attempt; the time until it is its turn does not count.
        max_retries: further attempts after a failed one.
        max_chars: length at which the result text is cut. verl cuts again, at
            ``rollout.multi_turn.max_tool_response_length`` (256 by default), so keep that above this.
    """

    topk: int = 3
    timeout_s: float = 30.0
    max_retries: int = 3
    max_chars: int = 4000

    def __post_init__(self) -> None:
        for key, low in (("topk", 1), ("max_retries", 0), ("max_chars", 1)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise SiopConfigError(f"search tool: {key} must be an integer of at least {low}, got {value!r}")
        timeout_s = self.timeout_s
        is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
        if not is_number or not 0 < timeout_s < math.inf:
            raise SiopConfigError(f"search tool: timeout_s must be a positive number, got {timeout_s!r}")


ConfigT = TypeVar("ConfigT", bound=SearchConfig)


def read_config(cls: type[ConfigT], tool: str, config: Mapping[str, Any]) -> ConfigT:
    """``config`` of a tool's YAML as a dataclass; verl's own key ``type`` is skipped.

    Raises:
        SiopConfigError: an unknown key (the message lists the allowed ones) or a wrong value.
    """
    allowed = [field.name for field in fields(cls)]
    unknown = sorted(set(config) - {*allowed, "type"})
    if unknown:
        raise SiopConfigError(f"{tool}: unknown config key(s) {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    return cls(**{key: value for key, value in config.items() if key != "type"})


def check_url(tool: str, key: str, url: Any) -> None:
    """Checks an address in the configuration.

    Raises:
        SiopConfigError: it is not an absolute http(s) address.
    """
    try:
        valid = isinstance(url, str) and httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        valid = False
    if not valid:
        raise SiopConfigError(f"{tool}: {key} must be an http(s) address, got {url!r}")


def shown_url(url: str) -> str:
    """The address without user, password and query string, for messages."""
    return str(httpx.URL(url).copy_with(userinfo=b"", query=None, fragment=None))


def read_query(parameters: Any) -> str:
    """The query in the model's arguments, without white space around it.

    Raises:
        InvalidQuery: it is missing, not text, empty or longer than ``MAX_QUERY_CHARS``.
    """
    if not isinstance(parameters, Mapping):
        raise InvalidQuery(f"invalid arguments: expected an object with a query, got {type(parameters).__name__}")
    query = parameters.get("query")
    if "query" not in parameters:
        raise InvalidQuery("invalid arguments: query is missing")
    if not isinstance(query, str):
        raise InvalidQuery(f"invalid arguments: query must be text, got {type(query).__name__}")
    if not query.strip():
        raise InvalidQuery("invalid arguments: query is empty")
    if len(query.strip()) > MAX_QUERY_CHARS:
        raise InvalidQuery(f"invalid arguments: query is longer than {MAX_QUERY_CHARS} characters")
    if _well_formed(query) != query:
        raise InvalidQuery("invalid arguments: query has half a surrogate pair")
    return query.strip()


def format_hits(contents: Sequence[str], max_chars: int) -> str:
    """One numbered line per hit, ``[1] …``; cut at ``max_chars`` characters; a fixed text when there is no hit."""
    text = "\n".join(f"[{i}] {content.strip()}" for i, content in enumerate(contents, start=1))
    return _well_formed(text[:max_chars]) or NOTHING_FOUND


def _well_formed(text: str) -> str:
    # JSON may hold surrogates without their partner, which neither HTTP bodies nor tokenizers take.
    return text.encode("utf-8", "replace").decode("utf-8")


class SearchTool(BaseTool):
    """A search over HTTP as a verl tool with one text argument, ``query``.

    A malformed call is answered to the model, as text. A service that cannot be reached is not: verl turns an exception
    of ``execute`` into a tool result that the model reads, and training would go on over made-up observations.
    ``release`` runs outside of that guard, so any failure is raised there once more and ends the rollout.

    ``execute`` returns the text, no reward, and the metrics ``search/hits`` and ``search/invalid_calls``.
    """

    tool_name: ClassVar[str]
    config_class: ClassVar[type[SearchConfig]]
    trust_env: ClassVar[bool] = True  # HTTP_PROXY and the like hold for this service

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        self.settings = read_config(self.config_class, self.tool_name, config)
        super().__init__(config, tool_schema or SEARCH_SCHEMA)
        self._failures: dict[str, Exception] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None
        self._reported = False

    async def fetch(self, client: httpx.AsyncClient, query: str) -> list[str]:
        """Contents of the hits, best first. One attempt; the caller limits its time.

        Raises:
            TransientFailure: the service did not answer or asks for another attempt.
            SearchRefused: it refused the request or sent no valid result.
        """
        raise NotImplementedError

    @property
    def address(self) -> str:
        """The service's URL, for messages."""
        raise NotImplementedError

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict]:
        """Searches for ``parameters["query"]``.

        Raises:
            SearchUnavailable: no answer after all attempts.
            SearchRefused: the service refused the request or its answer is not a search result.
        """
        try:
            query = read_query(parameters)
        except InvalidQuery as error:
            return ToolResponse(text=str(error)), 0.0, {"search/hits": 0, "search/invalid_calls": 1}
        try:
            contents = await self._fetch_with_retries(query)
        except Exception as error:
            self._failures[instance_id] = error
            if not self._reported:
                self._reported = True
                logger.error("%s: %s: %s", self.tool_name, type(error).__name__, error)
            raise
        metrics = {"search/hits": len(contents), "search/invalid_calls": 0}
        return ToolResponse(text=format_hits(contents, self.settings.max_chars)), 0.0, metrics

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

    async def _fetch_with_retries(self, query: str) -> list[str]:
        attempts = self.settings.max_retries + 1
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientFailure),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(multiplier=0.2, max=_MAX_WAIT_S) + wait_random(0, 0.2),
            reraise=True,
        )
        try:
            return await retrying(self._attempt, query)
        except TransientFailure as error:
            raise SearchUnavailable(self.address, attempts, str(error)) from error

    async def _attempt(self, query: str) -> list[str]:
        http, slots = self._connection()
        async with slots:
            try:
                # httpx's own limits are for each read: a server that sends a byte now and then would hold us for ever.
                return await asyncio.wait_for(self.fetch(http, query), self.settings.timeout_s)
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
        SearchRefused: another HTTP error, or no JSON.
    """

    def shown(text: str, size: int) -> str:
        return (text.replace(secret, "[secret]") if secret else text)[:size]

    try:
        response = await client.post(url, **kwargs)
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise TransientFailure(shown(f"{type(error).__name__}: {error}".rstrip(": "), 500)) from error
    status, text = response.status_code, response.text
    if status == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
        raise TransientFailure(f"HTTP {status}: {shown(text, 200)}")
    if not response.is_success:
        raise SearchRefused(f"{shown_url(url)} refused the search with HTTP {status}: {shown(text, 500)}")
    try:
        return response.json()
    except (ValueError, RecursionError) as error:
        raise SearchRefused(
            f"{shown_url(url)} answered with something that is not JSON: {shown(text, 200)!r}"
        ) from error
