"""Search tool over a retriever service with Search-R1's wire format (``POST /retrieve``)."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import httpx
from verl.tools.http_tool import SearchRefused, TransientFailure, post
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.tools.search_common import SearchTool
from verl.tools.search_config import SearchConfig, check_url, shown_url

REST_S = 10.0


@dataclass(frozen=True)
class LocalSearchConfig(SearchConfig):
    """Adds ``retrieval_service_url``, the full address of the endpoint, or those of its replicas with commas between.

    Replicas serve the same index: every search goes to the one with the fewest open searches of this process.
    """

    aliases: ClassVar[Mapping[str, str]] = {**SearchConfig.aliases, "retrieval_url": "retrieval_service_url"}

    retrieval_service_url: str = "http://127.0.0.1:8000/retrieve"

    def __post_init__(self) -> None:
        super().__post_init__()
        for url in self.replicas or [self.retrieval_service_url]:
            check_url("LocalSearchTool", "retrieval_service_url", url)

    @property
    def replicas(self) -> list[str]:
        """The addresses, each once."""
        if not isinstance(self.retrieval_service_url, str):
            return []
        return list(dict.fromkeys(url.strip() for url in self.retrieval_service_url.split(",")))


class LocalSearchTool(SearchTool):
    """Searches a retriever service; see ``SearchTool`` for the behaviour and ``LocalSearchConfig`` for the keys.

    A replica that failed is left alone for ``REST_S`` seconds while there are others: one that is down refuses at once,
    has no open searches, and would else get them all.
    """

    tool_name: ClassVar[str] = "LocalSearchTool"
    config_class: ClassVar[type[SearchConfig]] = LocalSearchConfig
    # The retriever is a neighbour: a proxy for the outside world is not the way to it.
    trust_env: ClassVar[bool] = False
    settings: LocalSearchConfig

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        super().__init__(config, tool_schema)
        self._open: Counter[str] = Counter()
        self._rests_until: dict[str, float] = {}

    @property
    def address(self) -> str:
        return ", ".join(map(shown_url, self.settings.replicas))

    def each_service(self) -> list[SearchTool]:
        if len(self.settings.replicas) == 1:
            return [self]
        tools: list[SearchTool] = []
        for url in self.settings.replicas:
            tool = LocalSearchTool(self.config, self.tool_schema)
            tool.settings = replace(self.settings, retrieval_service_url=url)
            tools.append(tool)
        return tools

    async def fetch(self, client: httpx.AsyncClient, query: str) -> list[str]:
        payload = {"queries": [query], "topk": self.settings.topk, "return_scores": True}
        url = self._least_loaded()
        self._open[url] += 1
        try:
            answer = await post(client, url, json=payload)
        except (TransientFailure, asyncio.CancelledError):  # cancelled: it took too long
            self._rests_until[url] = time.monotonic() + REST_S
            raise
        finally:
            self._open[url] -= 1
        try:
            (hits,) = answer["result"]
            contents = [hit["document"]["contents"] for hit in hits]
        except (KeyError, TypeError, ValueError) as error:
            raise SearchRefused(
                f"{shown_url(url)} sent no list of hits with document.contents: {answer!r:.200}"
            ) from error
        if not all(isinstance(text, str) for text in contents):
            raise SearchRefused(f"{shown_url(url)} sent a hit whose document.contents is not text")
        return contents

    def _least_loaded(self) -> str:
        now = time.monotonic()
        urls = self.settings.replicas
        awake = [url for url in urls if self._rests_until.get(url, now) <= now]
        if not awake:  # then by turns, so that further attempts come to one that works
            return min(urls, key=lambda url: (self._open[url], self._rests_until[url]))
        # Among equals by chance: else the first searches of all processes meet at the first replica.
        return min(awake, key=lambda url: (self._open[url], random.random()))
