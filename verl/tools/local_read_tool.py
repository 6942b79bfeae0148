"""Tool that reads a document of the retriever's corpus further than a search shows it (``POST /read``)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import httpx
from verl.tools.control_tokens import neutralise, well_formed
from verl.tools.http_tool import HttpTool, SearchRefused, post
from verl.tools.local_search_tool import LocalSearchConfig
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.tools.search_config import shown_url
from verl.utils.siop.errors import SiopConfigError

MAX_TITLE_CHARS, MAX_PAGE, MAX_PAGE_CHARS = 512, 10**6, 10**5  # the service's limits
MIN_CHARS = 64  # half of it holds the longest " (page 1000000 of 1000000)"
HEADING_CHARS = 100
READ_SCHEMA = OpenAIFunctionToolSchema.model_validate(
    {
        "type": "function",
        "function": {
            "name": "read",
            "description": "Reads a document whose title a search has shown.",
            "parameters": {
                "type": "object",
                "properties": {
                    "title": {"type": "string", "description": "The title, as it was shown."},
                    "page": {"type": "integer", "description": "Which page of a long document, from 1."},
                },
                "required": ["title"],
            },
        },
    }
)


class LocalReadTool(HttpTool):
    """Reads a document by its title, or else its id, a page of ``max_chars`` characters at a time.

    Its configuration is that of ``LocalSearchTool``, whose replicas it asks by turns, after a failure the next;
    ``topk`` says nothing here. The service must have been started with ``--read``.

    ``execute`` returns ``TITLE (page 1 of 3)`` and the text, no reward, and the metrics ``read/found``,
    ``read/invalid_calls`` and, if control tokens were found in the text, their number ``search/neutralised``. The
    heading has ``HEADING_CHARS`` characters of the ``max_chars`` (half of less than twice as many), whatever the title,
    of which the beginning is shown: so all pages together are the document.
    """

    tool_name: ClassVar[str] = "LocalReadTool"
    config_class: ClassVar[type[LocalSearchConfig]] = LocalSearchConfig
    trust_env: ClassVar[bool] = False  # as LocalSearchTool
    settings: LocalSearchConfig

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        schema = tool_schema or READ_SCHEMA
        types = {name: value.type for name, value in schema.function.parameters.properties.items()}
        if types.get("title") != "string" or types.get("page", "integer") != "integer":
            raise SiopConfigError(
                f"LocalReadTool: tool_schema: its parameters must be title (type string) and may be page (type "
                f"integer), got {types}"
            )
        required = schema.function.parameters.required
        if required and "title" not in required:
            raise SiopConfigError(f"LocalReadTool: tool_schema: required must name title, got {required}")
        super().__init__(config, schema)
        longest = self.settings.max_chars
        if longest < MIN_CHARS:
            raise SiopConfigError(f"LocalReadTool: max_chars must be at least {MIN_CHARS}, got {longest}")
        self._heading_chars = min(HEADING_CHARS, longest // 2)
        self._urls = [str(httpx.URL(url).join("read")) for url in self.settings.replicas]
        self._turns = itertools.count(random.randrange(len(self._urls)))  # not every process begins at the first

    @property
    def address(self) -> str:
        return ", ".join(map(shown_url, self._urls))

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict]:
        """Reads the document that ``parameters`` names.

        Raises:
            SearchUnavailable: no answer after all attempts.
            SearchRefused: the service refused the request or its answer is no document.
        """
        try:
            title, page = _read_arguments(parameters)
        except ValueError as error:
            text = f'invalid arguments: {error}; for example {{"title": "Some title", "page": 1}}'
            return ToolResponse(text=text), 0.0, {"read/found": 0, "read/invalid_calls": 1}
        replicas = itertools.cycle(self._urls)
        urls = itertools.islice(replicas, next(self._turns) % len(self._urls), None)
        try:
            found = await self.call(lambda client: self._fetch(client, next(urls), title, page))
        except Exception as error:
            self.note_failure(instance_id, error)
            raise
        metrics = {"read/found": int(found is not None), "read/invalid_calls": 0}
        if found is None:
            return ToolResponse(text="no document has this title or id"), 0.0, metrics
        pages = found["pages"]
        if page > pages:
            return ToolResponse(text=f"invalid arguments: the document has {pages} page(s)"), 0.0, metrics
        place = f" (page {page} of {pages})\n"
        heading = found["title"][: max(0, self._heading_chars - len(place))] + place
        text, neutralised = neutralise(heading + found["text"])
        if neutralised:
            metrics["search/neutralised"] = neutralised
        return ToolResponse(text=text), 0.0, metrics

    async def _fetch(self, client: httpx.AsyncClient, url: str, title: str, page: int) -> dict[str, Any] | None:
        page_chars = min(self.settings.max_chars - self._heading_chars, MAX_PAGE_CHARS)
        answer = await post(client, url, json={"title": title, "page": page, "page_chars": page_chars})
        try:
            result = answer["result"]
            if result is None:
                return None
            known = isinstance(result["title"], str) and isinstance(result["text"], str) and result["pages"] >= 1
        except (KeyError, TypeError) as error:
            raise SearchRefused(f"{shown_url(url)} sent no document: {answer!r:.200}") from error
        if not known or len(result["text"]) > page_chars:
            raise SearchRefused(f"{shown_url(url)} sent no document, or too long a page: {answer!r:.200}")
        return result


def _read_arguments(parameters: Any) -> tuple[str, int]:
    if not isinstance(parameters, Mapping):
        raise ValueError(f"expected an object with a title, got {type(parameters).__name__}")
    title, page = parameters.get("title"), parameters.get("page", 1)
    if not isinstance(title, str) or not title.strip() or len(title) > MAX_TITLE_CHARS:
        raise ValueError(f"title must be a text of at most {MAX_TITLE_CHARS} characters")
    if well_formed(title) != title:
        raise ValueError("title has half a surrogate pair")
    if not isinstance(page, int) or isinstance(page, bool) or not 1 <= page <= MAX_PAGE:
        raise ValueError(f"page must be a whole number from 1 to {MAX_PAGE}")
    return title.strip(), page
