"""Search tool over Google through the Serper API (https://serper.dev)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.tools.search_common import SearchConfig, SearchRefused, SearchTool, check_url, post, shown_url
from verl.utils.siop.errors import SiopConfigError


@dataclass(frozen=True)
class SerperSearchConfig(SearchConfig):
    """Adds the service's address, the key (``SERPER_API_KEY`` of the environment when empty), country and language."""

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

    Raises:
        SiopConfigError: no key in the config or the environment, or one that cannot be sent.
    """

    tool_name: ClassVar[str] = "SerperSearchTool"
    config_class: ClassVar[type[SearchConfig]] = SerperSearchConfig
    settings: SerperSearchConfig

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        super().__init__(config, tool_schema)
        self._key = self.settings.api_key or os.environ.get("SERPER_API_KEY", "")
        self._key = self._key.strip()  # keys read from files end with a line break
        if not self._key:
            raise SiopConfigError(
                "SerperSearchTool needs a key: set the environment variable SERPER_API_KEY (or api_key in its config)"
            )
        # httpx would refuse it at every search, with the key in its message.
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise SiopConfigError("SerperSearchTool: the key may have printable ASCII characters only, without spaces")

    @property
    def address(self) -> str:
        return shown_url(self.settings.api_url)

    async def fetch(self, client: httpx.AsyncClient, query: str) -> list[str]:
        settings = self.settings
        body = {"q": query, "num": settings.topk, "gl": settings.country, "hl": settings.language}
        answer = await post(client, settings.api_url, self._key, json=body, headers={"X-API-KEY": self._key})
        # A search without results has no "organic" list.
        hits = answer.get("organic", []) if isinstance(answer, dict) else None
        if not isinstance(hits, list) or not all(isinstance(hit, dict) for hit in hits):
            raise SearchRefused(f"{self.address} sent no list of organic results")
        parts = [[part for part in (hit.get("title"), hit.get("snippet")) if part] for hit in hits]
        if not all(isinstance(part, str) for found in parts for part in found):
            raise SearchRefused(f"{self.address} sent a hit whose title or snippet is not text")
        texts = [": ".join(found) for found in parts]
        return [text for text in texts if text][: settings.topk]
