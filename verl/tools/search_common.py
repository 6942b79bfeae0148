"""What the search tools share: reading their configuration, the model's arguments and the text of a result."""

from __future__ import annotations

import asyncio
import logging
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
_MAX_WAIT_S = 5.0


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
        timeout_s: seconds for one attempt.
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
        if not isinstance(self.timeout_s, int | float) or isinstance(self.timeout_s, bool) or self.timeout_s <= 0:
            raise SiopConfigError(f"search tool: timeout_s must be a positive number, got {self.timeout_s!r}")


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


def read_query(parameters: Any) -> str:
    """The query in the model's arguments, without white space around it.

    Raises:
        InvalidQuery: it is missing, not text or empty.
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
    return query.strip()


def format_hits(contents: Sequence[str], max_chars: int) -> str:
    """One numbered line per hit, ``[1] …``; cut at ``max_chars`` characters; a fixed text when there is no hit."""
    text = "\n".join(f"[{i}] {content.strip()}" for i, content in enumerate(contents, start=1))
    return text[:max_chars] or NOTHING_FOUND


class SearchTool(BaseTool):
    """A search over HTTP as a verl tool with one text argument, ``query``.

    A malformed call is answered to the model, as text. A service that cannot be reached is not: verl turns an exception
    of ``execute`` into a tool result that the model reads, and training would go on over made-up observations.
    ``release`` runs outside of that guard, so the failure is raised there once more and ends the rollout.

    ``execute`` returns the text, no reward, and the metrics ``search/hits`` and ``search/invalid_calls``.
    """

    tool_name: ClassVar[str]
    config_class: ClassVar[type[SearchConfig]]

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        self.settings = read_config(self.config_class, self.tool_name, config)
        super().__init__(config, tool_schema or SEARCH_SCHEMA)
        self._failures: dict[str, SiopError] = {}
        self._client: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None
        self._reported = False

    async def fetch(self, client: httpx.AsyncClient, query: str) -> list[str]:
        """Contents of the hits, best first. One attempt.

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
        except (SearchUnavailable, SearchRefused) as error:
            self._failures[instance_id] = error
            if not self._reported:
                self._reported = True
                logger.error("%s: %s", self.tool_name, error)
            raise
        metrics = {"search/hits": len(contents), "search/invalid_calls": 0}
        return ToolResponse(text=format_hits(contents, self.settings.max_chars)), 0.0, metrics

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """Forgets the call.

        Raises:
            SearchUnavailable, SearchRefused: the call failed with it.
        """
        failure = self._failures.pop(instance_id, None)
        if failure is not None:
            raise failure

    async def aclose(self) -> None:
        """Closes the pooled connections."""
        if self._client is not None:
            await self._client[1].aclose()
            self._client = None

    async def _fetch_with_retries(self, query: str) -> list[str]:
        attempts = self.settings.max_retries + 1
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientFailure),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(multiplier=0.2, max=_MAX_WAIT_S) + wait_random(0, 0.2),
            reraise=True,
        )
        try:
            return await retrying(self.fetch, self._pooled_client(), query)
        except TransientFailure as error:
            raise SearchUnavailable(self.address, attempts, str(error)) from error

    def _pooled_client(self) -> httpx.AsyncClient:
        # A client belongs to the event loop that opened its connections.
        loop = asyncio.get_running_loop()
        if self._client is None or self._client[0] is not loop:
            self._client = (loop, httpx.AsyncClient(timeout=self.settings.timeout_s))
        return self._client[1]


async def post(client: httpx.AsyncClient, url: str, **kwargs: Any) -> Any:
    """POST, and the JSON of the answer.

    Raises:
        TransientFailure: no connection, time-out, HTTP 429 or 5xx.
        SearchRefused: another HTTP error, or no JSON.
    """
    try:
        response = await client.post(url, **kwargs)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise TransientFailure(f"{type(error).__name__}: {error}") from error
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
        raise TransientFailure(f"HTTP {response.status_code}: {response.text[:200]}")
    if not response.is_success:
        raise SearchRefused(f"{url} refused the search with HTTP {response.status_code}: {response.text[:500]}")
    try:
        return response.json()
    except ValueError as error:
        raise SearchRefused(f"{url} answered with something that is not JSON: {response.text[:200]!r}") from error
