"""What the search tools share: the model's arguments, the text of a result, and the calls over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random
from verl.tools.base_tool import BaseTool
from verl.tools.control_tokens import neutralise
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.tools.search_config import SearchConfig, read_config, shown_url
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
PARAMETERS = {"query": "string", "query_list": "array"}  # either can be in a tool's schema
MAX_QUERY_CHARS = 4096  # the retriever's limit
MAX_QUERIES = 10  # in one call; the first release took three
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


def read_queries(parameters: Any, offered: str = "query") -> list[str]:
    """The queries in the model's arguments, without white space around them: ``query`` alone, or all of ``query_list``.

    Args:
        parameters: the arguments.
        offered: which of the two the tool's schema names, for the messages; the other one is taken all the same.

    Raises:
        InvalidQuery: neither or both are there, ``query_list`` is no list of 1 to ``MAX_QUERIES``, or a query is not
            text, empty or longer than ``MAX_QUERY_CHARS``.
    """
    if not isinstance(parameters, Mapping):
        raise InvalidQuery(f"expected an object with a {offered}, got {type(parameters).__name__}")
    given = [name for name in PARAMETERS if name in parameters]
    if not given:
        raise InvalidQuery(f"{offered} is missing")
    if len(given) > 1:
        raise InvalidQuery(f"give {' or '.join(given)}, not both")
    if given == ["query"]:
        return [_read_query(parameters["query"], "query")]
    queries = parameters["query_list"]
    if not isinstance(queries, list):
        raise InvalidQuery(f"query_list must be a list of texts, got {type(queries).__name__}")
    if not queries:
        raise InvalidQuery("query_list is empty")
    if len(queries) > MAX_QUERIES:
        raise InvalidQuery(f"query_list has {len(queries)} queries; at most {MAX_QUERIES} are allowed in one call")
    return [_read_query(query, f"query_list[{i}]") for i, query in enumerate(queries)]


def _read_query(query: Any, name: str) -> str:
    if not isinstance(query, str):
        raise InvalidQuery(f"{name} must be text, got {type(query).__name__}")
    if not query.strip():
        raise InvalidQuery(f"{name} is empty")
    if len(query.strip()) > MAX_QUERY_CHARS:
        raise InvalidQuery(f"{name} is longer than {MAX_QUERY_CHARS} characters")
    if _well_formed(query) != query:
        raise InvalidQuery(f"{name} has half a surrogate pair")
    return query.strip()


def format_hits(contents: Sequence[str], max_chars: int) -> str:
    """One numbered line per hit, ``[1] …``, without control tokens (:func:`~verl.tools.control_tokens.neutralise`).

    Cut at ``max_chars`` characters, without white space at the end; a fixed text when there is no hit.
    """
    return format_results([contents], max_chars)[0]


def format_results(results: Sequence[Sequence[str]], max_chars: int) -> tuple[str, int]:
    """The hits of each query as one observation, and how many control tokens were neutralised in them.

    One query reads as :func:`format_hits`. Of several, each has a heading ``Query 1:`` and an equal share of
    ``max_chars``, of which what a shorter one leaves goes to the others. The queries themselves are not repeated: an
    observation is evidence, and an agent must not be able to write its own.

    >>> format_results([["a", "b"], []], 99)
    ('Query 1:\\n[1] a\\n[2] b\\n\\nQuery 2:\\nnothing found', 0)
    """
    texts, neutralised = [], 0
    for contents in results:
        clean = [neutralise(_well_formed(content)) for content in contents]
        neutralised += sum(count for _, count in clean)
        lines = [f"[{i}] {content.strip()}" for i, (content, _) in enumerate(clean, start=1)]
        texts.append("\n".join(lines) or NOTHING_FOUND)
    if len(texts) == 1:
        return texts[0][:max_chars].rstrip(), neutralised
    headings = [f"Query {i}:\n" for i in range(1, len(texts) + 1)]
    left = max_chars - sum(map(len, headings)) - 2 * (len(texts) - 1)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for rank, i in enumerate(by_length):
        texts[i] = texts[i][: max(0, left // (len(texts) - rank))].rstrip()
        left -= len(texts[i])
    text = "\n\n".join(heading + text for heading, text in zip(headings, texts, strict=True))
    return text[:max_chars].rstrip(), neutralised


def _well_formed(text: str) -> str:
    # JSON may hold surrogates without their partner, which neither HTTP bodies nor tokenizers take.
    return text.encode("utf-8", "replace").decode("utf-8")


def offered_parameter(tool: str, schema: OpenAIFunctionToolSchema) -> str:
    """The parameter of the schema that takes the queries: ``query``, or ``query_list`` where there is no ``query``.

    Raises:
        SiopConfigError: neither is in the schema, or not with its type.
    """
    types = {name: value.type for name, value in schema.function.parameters.properties.items()}
    offered = [name for name in PARAMETERS if name in types]
    if not offered or any(types[name] != PARAMETERS[name] for name in offered):
        raise SiopConfigError(
            f"{tool}: tool_schema: its parameters must have query (type string) or query_list (type array), got {types}"
        )
    return offered[0]


class SearchTool(BaseTool):
    """A search over HTTP as a verl tool.

    Its argument is ``query``, a text (the default), or the first release's ``query_list``, up to ``MAX_QUERIES`` texts
    that are searched for at the same time and answered as one observation. Which of them the model is told of is in
    the ``tool_schema`` of the configuration; both are always taken. Building a tool checks its configuration and
    starts nothing.

    A malformed call is answered to the model, as text. A service that cannot be reached is not: verl turns an exception
    of ``execute`` into a tool result that the model reads, and training would go on over made-up observations.
    ``release`` runs outside of that guard, so any failure is raised there once more and ends the rollout.

    ``execute`` returns the text, no reward, and the metrics ``search/hits`` and ``search/invalid_calls``; if control
    tokens were found in the hits, their number ``search/neutralised``; and of a tool that caches,
    ``search/cache_hits`` and ``search/cache_misses``, in queries.
    """

    tool_name: ClassVar[str]
    config_class: ClassVar[type[SearchConfig]]
    trust_env: ClassVar[bool] = True  # HTTP_PROXY and the like hold for this service
    caches: bool = False

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        self.settings = read_config(self.config_class, self.tool_name, config)
        schema = tool_schema or SEARCH_SCHEMA
        self._parameter = offered_parameter(self.tool_name, schema)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the schema, in every process
            super().__init__(config, schema)
        self._failures: dict[str, Exception] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None
        self._reported = False

    async def cached(self, query: str) -> list[str] | None:
        """Contents of the hits if they are known without the service."""
        return None

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

    def each_service(self) -> list[SearchTool]:
        """A tool for every replica of the service, which asks that one alone."""
        return [self]

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict]:
        """Searches for the query or the queries in ``parameters``.

        Raises:
            SearchUnavailable: no answer after all attempts.
            SearchRefused: the service refused the request or its answer is not a search result.
        """
        try:
            queries = read_queries(parameters, self._parameter)
        except InvalidQuery as error:
            text = f"invalid arguments: {error}"
            if self._parameter == "query_list":
                text += '; for example {"query_list": ["first query", "second query"]}'
            return ToolResponse(text=text), 0.0, {"search/hits": 0, "search/invalid_calls": 1}
        try:
            found = await self._search(queries)
        except Exception as error:
            self._failures[instance_id] = error
            if not self._reported:
                self._reported = True
                logger.error("%s: %s: %s", self.tool_name, type(error).__name__, error)
            raise
        results = [contents for contents, _ in found]
        text, neutralised = format_results(results, self.settings.max_chars)
        metrics = {"search/hits": sum(map(len, results)), "search/invalid_calls": 0}
        if neutralised:
            metrics["search/neutralised"] = neutralised
        if self.caches:
            metrics["search/cache_hits"] = sum(known for _, known in found)
            metrics["search/cache_misses"] = len(found) - metrics["search/cache_hits"]
        return ToolResponse(text=text), 0.0, metrics

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

    async def _search(self, queries: Sequence[str]) -> list[tuple[list[str], bool]]:
        """Of each query the contents of its hits, and whether the cache had them."""

        async def one(query: str) -> tuple[list[str], bool]:
            known = await self.cached(query)
            return (await self._fetch_with_retries(query), False) if known is None else (known, True)

        # All of them end before the first failure is raised, so that none goes on unwatched.
        found = await asyncio.gather(*map(one, queries), return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return [result for result in found if not isinstance(result, BaseException)]

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
