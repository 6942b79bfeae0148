"""Search tool over Google through the Serper API (https://serper.dev)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
from verl.tools.http_tool import SearchRefused, TransientFailure, post
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.tools.search_cache import SearchCache, is_hit
from verl.tools.search_common import SearchTool
from verl.tools.search_config import SearchConfig, check_url, shown_url
from verl.utils.siop.errors import SiopConfigError

CACHE_DIR = "search_cache"


@dataclass(frozen=True)
class SerperSearchConfig(SearchConfig):
    """Adds the service's address, the key (``SERPER_API_KEY`` of the environment when empty), country and language."""

    aliases: ClassVar[Mapping[str, str]] = {
        **SearchConfig.aliases,
        "serper_api_key": "api_key",
        "search_region": "country",
        "search_lang": "language",
    }

    api_url: str = "https://google.serper.dev/search"
    api_key: str = field(default="", repr=False)
    country: str = "us"
    language: str = "en"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_url("SerperSearchTool", "api_url", self.api_url)
        for key in ("api_key", "country", "language"):
            if not isinstance(getattr(self, key), str):
                raise SiopConfigError(f"SerperSearchTool: {key} must be text")


class SerperSearchTool(SearchTool):
    """Searches Google; a hit reads ``title: snippet``. See ``SearchTool`` and ``SerperSearchConfig``.

    Results are kept in the folder ``SERPER_CACHE_DIR`` of the environment (``search_cache`` when unset; none when
    empty), which any number of processes may share. What is in it needs no key.

    Raises:
        SiopConfigError: no key in the config or the environment and nothing in the cache, a key that cannot be sent, or
            a folder that cannot be used.
    """

    tool_name: ClassVar[str] = "SerperSearchTool"
    config_class: ClassVar[type[SearchConfig]] = SerperSearchConfig
    settings: SerperSearchConfig

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        super().__init__(config, tool_schema)
        if os.environ.get("SERPER_MOCK"):
            raise SiopConfigError(
                "SERPER_MOCK is not used here: unset it; SERPER_CACHE_DIR names a folder of results that are replayed "
                "without a key"
            )
        self._key = self.settings.api_key or os.environ.get("SERPER_API_KEY", "")
        self._key = self._key.strip()  # keys read from files end with a line break
        folder = os.environ.get("SERPER_CACHE_DIR", CACHE_DIR)
        self._cache = SearchCache(folder, writable=bool(self._key)) if folder else None
        self.caches = self._cache is not None
        if not self._key and (self._cache is None or self._cache.is_empty()):
            raise SiopConfigError(
                "SerperSearchTool needs a key: set the environment variable SERPER_API_KEY (or api_key in its config); "
                f"without one it can only replay results, and SERPER_CACHE_DIR={folder} has none"
            )
        # httpx would refuse it at every search, with the key in its message.
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise SiopConfigError("SerperSearchTool: the key may have printable ASCII characters only, without spaces")

    @property
    def address(self) -> str:
        return shown_url(self.settings.api_url)

    async def cached(self, query: str) -> list[str] | None:
        """Hits of the cache.

        Raises:
            SiopConfigError: it has none, and there is no key to ask the service.
        """
        if self._cache is None:
            return None
        organic = await asyncio.to_thread(self._cache.read, self.settings.api_url, self._body(query))
        if organic is not None:
            return self._texts(organic)
        if not self._key:
            raise SiopConfigError(
                f"SerperSearchTool: {query[:100]!r} is not in SERPER_CACHE_DIR={self._cache.path}, and there is no key "
                "to search for it: set SERPER_API_KEY"
            )
        return None

    async def fetch(self, client: httpx.AsyncClient, query: str) -> list[str]:
        url, body = self.settings.api_url, self._body(query)
        answer = await post(client, url, self._key, json=body, headers={"X-API-KEY": self._key})
        if isinstance(answer, dict) and not {"organic", "searchParameters"} & set(answer):
            # What it says in place of a result, for example {"message": "rate limit exceeded"}.
            said = str(answer).replace(self._key, "[secret]")
            raise TransientFailure(f"HTTP 200 without a search result: {said:.200}")
        # A search without results repeats its searchParameters, and has no "organic" list.
        hits = answer.get("organic", []) if isinstance(answer, dict) else None
        if not isinstance(hits, list) or not all(map(is_hit, hits)):
            raise SearchRefused(f"{self.address} sent no list of organic results with texts as title and snippet")
        texts = self._texts(hits)
        if self._cache is not None:
            await asyncio.to_thread(self._cache.write, url, body, hits)
        return texts

    def _body(self, query: str) -> dict[str, Any]:
        settings = self.settings
        return {"q": query, "num": settings.topk, "gl": settings.country, "hl": settings.language}

    def _texts(self, hits: list[dict[str, Any]]) -> list[str]:
        return [": ".join(part for part in (hit.get("title"), hit.get("snippet")) if part) for hit in hits]
