"""One index in several parts, each behind a retriever of its own: asks all of them, and merges."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from verl.utils.siop.errors import ServiceUnavailable, SiopConfigError, SiopError
from verl.utils.siop.retriever.index import Hits

_THREADS = 128  # searches at once, of all requests together


class ShardUnavailable(ServiceUnavailable):
    """A part of the index did not answer; the others alone would be another index."""

    service = "shard"


class ShardedIndex:
    """An index whose documents are spread over several retriever services.

    The best k of all are among the best k of each, so the merge is exact. Equal scores keep the order of the shards.

    Args:
        urls: addresses of the services, without a path.
        timeout_s: for each answer of a shard.

    Raises:
        ShardUnavailable: one does not answer.
        SiopConfigError: no address, one twice, or their scores cannot be compared: of BM25 they depend on the words of
            the whole corpus, and of a dense index on the encoder, which must be the same.
    """

    def __init__(self, urls: Sequence[str], *, timeout_s: float = 30.0) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        if not self._urls or len(set(self._urls)) != len(self._urls):
            raise SiopConfigError(f"--shards must be different addresses, got {', '.join(urls) or 'none'}")
        limits = httpx.Limits(max_connections=_THREADS)
        # Neighbours: a proxy for the outside world is not the way to them.
        self._http = httpx.Client(timeout=timeout_s, limits=limits, trust_env=False)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shard")
        self.health = self._check([self._json(url, self._http.get, "/health") for url in self._urls])

    def _check(self, health: list[Any]) -> dict[str, Any]:
        for url, answer in zip(self._urls, health, strict=True):
            if not isinstance(answer, dict) or not isinstance(answer.get("documents"), int):
                raise SiopConfigError(f"{url} is no retriever of this project: its /health is {answer!r:.200}")
            if answer.get("kind") == "bm25":
                raise SiopConfigError(
                    f"{url} has BM25, whose scores depend on the words of the whole corpus and cannot be compared with "
                    "those of another part; use one index, or a dense one"
                )
        first = health[0]
        for url, answer in zip(self._urls, health, strict=True):
            if answer.get("encoder") != first.get("encoder"):
                raise SiopConfigError(f"{url} and {self._urls[0]} have different encoders, whose scores differ too")
        documents = [answer["documents"] for answer in health]
        return {"kind": "sharded", "shards": dict(zip(self._urls, health, strict=True)), "documents": sum(documents)}

    def __len__(self) -> int:
        return self.health["documents"]

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The best ``k`` documents of each query, best first.

        Raises:
            ShardUnavailable: a shard did not answer, even when asked twice.
            SiopError: it answered something that is no result.
        """
        body = {"queries": list(queries), "topk": k, "return_scores": True}

        def ask(url: str) -> list[Hits]:
            answer = self._json(url, self._http.post, "/retrieve", json=body)
            try:
                found = [[(hit["document"], float(hit["score"])) for hit in hits] for hits in answer["result"]]
            except (KeyError, TypeError, ValueError) as error:
                raise SiopError(f"{url} sent no list of hits with document and score: {answer!r:.200}") from error
            if len(found) != len(queries):
                raise SiopError(f"{url} sent {len(found)} results for {len(queries)} queries")
            return found

        by_shard = list(self._pool.map(ask, self._urls))
        return [merge([hits[i] for hits in by_shard], k) for i in range(len(queries))]

    def _json(self, url: str, send: Callable[..., httpx.Response], path: str, **kwargs: Any) -> Any:
        failure = ""
        for _ in range(2):
            try:
                response = send(f"{url}{path}", **kwargs)
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            failure = f"HTTP {response.status_code}: {response.text[:200]}"
            if response.is_client_error:
                raise SiopError(f"{url}{path} refused the search with {failure}")
            if response.is_success:
                try:
                    return response.json()
                except ValueError as error:
                    raise SiopError(f"{url}{path} sent no JSON: {response.text[:200]!r}") from error
        raise ShardUnavailable(url, 2, failure)


def merge(by_shard: Sequence[Hits], k: int) -> Hits:
    """The best ``k`` of several lists that are sorted by falling score; equal scores in the order of the lists.

    >>> merge([[({"id": 1}, 0.9), ({"id": 2}, 0.1)], [({"id": 3}, 0.5)]], 2)
    [({'id': 1}, 0.9), ({'id': 3}, 0.5)]
    """
    merged = heapq.merge(*by_shard, key=lambda hit: -hit[1])
    return [hit for _, hit in zip(range(k), merged, strict=False)]
