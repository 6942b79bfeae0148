"""What the search tools share: the model's arguments, the text of a result, and the calls over HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from verl.tools.control_tokens import LOOKAHEAD, neutralise, well_formed
from verl.tools.http_tool import HttpTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.utils.siop.errors import SiopConfigError

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

_SPACES = re.compile(r"\s+")
# What would read as the beginning of a hit, or of a query's hits.
_HEADING = re.compile(rf"[^\w\[［﹇]{{0,9}}(?:[\[［﹇]\W{{0,9}}\d|query\W{{0,9}}\d|{NOTHING_FOUND})", re.IGNORECASE)


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
    if well_formed(query) != query:
        raise InvalidQuery(f"{name} has half a surrogate pair")
    return query.strip()


def format_hits(contents: Sequence[str], max_chars: int) -> str:
    """The hits with their numbers, ``[1] …``, without control tokens (:func:`~verl.tools.control_tokens.neutralise`).

    No line begins with such a number, or like the heading of :func:`format_results`, but those written here: in a hit
    the line break before it becomes a space, while all other line breaks stay. Cut at ``max_chars`` characters, without
    white space at the end; a fixed text when there is no hit. What is cut off costs no time.

    >>> format_hits(["Paris\\nA city", "Lyon\\n[3] A town"], 99)
    '[1] Paris\\nA city\\n[2] Lyon [3] A town'
    """
    return format_results([contents], max_chars)[0]


def _folded(spaces: re.Match[str]) -> str:
    """White space in a hit, without the line break before what reads as a heading."""
    text = spaces.group()
    breaks = text.splitlines() != [text]
    return " " * len(text) if breaks and _HEADING.match(spaces.string, spaces.end()) else text


def _one_result(contents: Sequence[str], max_chars: int) -> tuple[str, int]:
    """The hits of one query, and how many control tokens were neutralised in what is shown of them."""
    text, neutralised = "", 0
    for i, content in enumerate(contents, start=1):
        left = max_chars - len(text)
        if left <= 0:
            break
        clean, count = neutralise(_SPACES.sub(_folded, content.strip()[: left + LOOKAHEAD]), left)
        text += f"[{i}] {clean}\n"
        neutralised += count
    return (text or NOTHING_FOUND)[:max_chars].rstrip(), neutralised


def format_results(results: Sequence[Sequence[str]], max_chars: int) -> tuple[str, int]:
    """The hits of each query as one observation, and how many control tokens were neutralised in them.

    One query reads as :func:`format_hits`. Of several, each has a heading ``Query 1:`` and an equal share of
    ``max_chars``, of which what a shorter one leaves goes to the others. The queries themselves are not repeated: an
    observation is evidence, and an agent must not be able to write its own.

    >>> format_results([["a", "b"], []], 99)
    ('Query 1:\\n[1] a\\n[2] b\\n\\nQuery 2:\\nnothing found', 0)
    """
    found = [_one_result(contents, max_chars) for contents in results]
    texts, neutralised = [text for text, _ in found], sum(count for _, count in found)
    if len(texts) == 1:
        return texts[0], neutralised
    headings = [f"Query {i}:\n" for i in range(1, len(texts) + 1)]
    left = max_chars - sum(map(len, headings)) - 2 * (len(texts) - 1)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for rank, i in enumerate(by_length):
        texts[i] = texts[i][: max(0, left // (len(texts) - rank))].rstrip()
        left -= len(texts[i])
    text = "\n\n".join(heading + text for heading, text in zip(headings, texts, strict=True))
    return text[:max_chars].rstrip(), neutralised


def offered_parameter(tool: str, schema: OpenAIFunctionToolSchema) -> str:
    """The parameter of the schema that takes the queries: the required one, else ``query`` if it is there.

    Raises:
        SiopConfigError: neither is in the schema, or not with its type; or whoever keeps to ``required`` would send
            none, or both.
    """
    types = {name: value.type for name, value in schema.function.parameters.properties.items()}
    offered = [name for name in PARAMETERS if name in types]
    if not offered or any(types[name] != PARAMETERS[name] for name in offered):
        raise SiopConfigError(
            f"{tool}: tool_schema: its parameters must have query (type string) or query_list (type array), got {types}"
        )
    required = schema.function.parameters.required
    wanted = [name for name in offered if name in required]
    if required and len(wanted) != 1:
        raise SiopConfigError(
            f"{tool}: tool_schema: required must be [{'] or ['.join(offered)}], and may name other parameters beside "
            f"it; got {required}"
        )
    return (wanted or offered)[0]


class SearchTool(HttpTool):
    """A search over HTTP as a verl tool; see :class:`~verl.tools.http_tool.HttpTool` for what happens to failures.

    Its argument is ``query``, a text (the default), or the first release's ``query_list``, up to ``MAX_QUERIES`` texts
    that are searched for at the same time and answered as one observation. Which of them the model is told of is in
    the ``tool_schema`` of the configuration; both are always taken.

    ``execute`` returns the text, no reward, and the metrics ``search/hits`` and ``search/invalid_calls``; if control
    tokens were found in the hits, their number ``search/neutralised``; and of a tool that caches,
    ``search/cache_hits`` and ``search/cache_misses``, in queries.
    """

    caches: bool = False

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        schema = tool_schema or SEARCH_SCHEMA
        self._parameter = offered_parameter(self.tool_name, schema)
        super().__init__(config, schema)

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
            self.note_failure(instance_id, error)
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

    async def _search(self, queries: Sequence[str]) -> list[tuple[list[str], bool]]:
        """Of each query the contents of its hits, ``topk`` at most and none empty, and whether the cache had them."""

        async def one(query: str) -> tuple[list[str], bool]:
            known = await self.cached(query)
            contents = await self.call(lambda client: self.fetch(client, query)) if known is None else known
            seen = [text for text in contents if any(c.isprintable() and not c.isspace() for c in text)]
            return seen[: self.settings.topk], known is not None

        # All of them end before the first failure is raised, so that none goes on unwatched.
        found = await asyncio.gather(*map(one, queries), return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return [result for result in found if not isinstance(result, BaseException)]
