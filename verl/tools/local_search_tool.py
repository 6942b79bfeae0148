"""Search tool over a retriever service with Search-R1's wire format (``POST /retrieve``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import httpx
from verl.tools.search_common import SearchRefused, SearchTool, post
from verl.tools.search_config import SearchConfig, check_url, shown_url


@dataclass(frozen=True)
class LocalSearchConfig(SearchConfig):
    """Adds ``retrieval_service_url``, the full address of the endpoint."""

    aliases: ClassVar[Mapping[str, str]] = {**SearchConfig.aliases, "retrieval_url": "retrieval_service_url"}

    retrieval_service_url: str = "http://127.0.0.1:8000/retrieve"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_url("LocalSearchTool", "retrieval_service_url", self.retrieval_service_url)


class LocalSearchTool(SearchTool):
    """Searches a retriever service; see ``SearchTool`` for the behaviour and ``LocalSearchConfig`` for the keys."""

    tool_name: ClassVar[str] = "LocalSearchTool"
    config_class: ClassVar[type[SearchConfig]] = LocalSearchConfig
    # The retriever is a neighbour: a proxy for the outside world is not the way to it.
    trust_env: ClassVar[bool] = False
    settings: LocalSearchConfig

    @property
    def address(self) -> str:
        return shown_url(self.settings.retrieval_service_url)

    async def fetch(self, client: httpx.AsyncClient, query: str) -> list[str]:
        payload = {"queries": [query], "topk": self.settings.topk, "return_scores": True}
        answer = await post(client, self.settings.retrieval_service_url, json=payload)
        try:
            (hits,) = answer["result"]
            contents = [hit["document"]["contents"] for hit in hits]
        except (KeyError, TypeError, ValueError) as error:
            raise SearchRefused(
                f"{self.address} sent no list of hits with document.contents: {answer!r:.200}"
            ) from error
        if not all(isinstance(text, str) for text in contents):
            raise SearchRefused(f"{self.address} sent a hit whose document.contents is not text")
        return contents
