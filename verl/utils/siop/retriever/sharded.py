"""One index in several parts, each behind a retriever of its own: asks all of them, and merges."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from pydantic import BaseModel, Field, ValidationError
from verl.utils.siop.errors import ServiceUnavailable, SiopConfigError, SiopError
from verl.utils.siop.retriever.encoder import EncoderIdentity
from verl.utils.siop.retriever.index import Hits

INDEX_HEADER = "X-Siop-Index"  # of an answer: which index it is of
_THREADS = 128  # searches at once, of all requests together
_NO_FACTS = ("status", "topk")  # of /health: how it is served, not what
# The weights say more than the first two, and scores of several dtypes compare.
_NO_IDENTITY = {"model", "revision", "dtype"}


class ShardUnavailable(ServiceUnavailable):
    """A part of the index did not answer; the others alone would be another index."""

    service = "shard"


class ShardChanged(ShardUnavailable):
    """A part has another index than when this service started."""

    def __str__(self) -> str:
        return f"the {self.service} at {self.url} has another index than when this service started; start this one anew"


class _Part(BaseModel):
    """What a part has to say under /health; a part may have parts of its own."""

    documents: int = Field(ge=1, strict=True)
    corpus_sha256: str
    encoder: EncoderIdentity
    shards: list[_Part] = []

    def corpora(self) -> list[str]:
        """Digests of the corpora in their order."""
        return [sha256 for part in self.shards for sha256 in part.corpora()] or [self.corpus_sha256]

    def same_encoder(self, other: _Part) -> bool:
        one, two = (part.encoder.model_dump(exclude=_NO_IDENTITY) for part in (self, other))
        return one == two


def index_id(facts: Mapping[str, Any]) -> str:
    """Digest of what /health tells of an index."""
    kept = {name: value for name, value in facts.items() if name not in _NO_FACTS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


class ShardedIndex:
    """An index whose documents are spread over several retriever services.

    The best k of all are among the best k of each, so the merge is exact. Equal scores keep the order of the shards.

    Args:
        urls: addresses of the services; the ``/retrieve`` that RETRIEVER_URL has may follow.
        timeout_s: for each answer of a shard.

    Raises:
        ShardUnavailable: one does not answer.
        SiopConfigError: no address, one twice, a corpus twice, or their scores cannot be compared: of BM25 they depend
            on the words of the whole corpus, and of a dense index on the encoder, which must be the same.
    """

    def __init__(self, urls: Sequence[str], *, timeout_s: float = 30.0) -> None:
        self._urls = [url.rstrip("/").removesuffix("/retrieve") for url in urls]
        if not self._urls or len(set(self._urls)) != len(self._urls):
            raise SiopConfigError(f"--shards must be different addresses, got {', '.join(urls) or 'none'}")
        limits = httpx.Limits(max_connections=_THREADS)
        # Neighbours: a proxy for the outside world is not the way to them.
        self._http = httpx.Client(timeout=timeout_s, limits=limits, trust_env=False)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shard")
        health = list(self._pool.map(self._health, self._urls))
        self._ids, self._facts, self._documents = list(map(index_id, health)), *self._check(health)

    def _check(self, health: list[Any]) -> tuple[dict[str, Any], int]:
        parts: list[_Part] = []
        seen: dict[str, str] = {}
        for url, answer in zip(self._urls, health, strict=True):
            if answer.get("kind") == "bm25":
                raise SiopConfigError(
                    f"{url} has BM25, whose scores depend on the words of the whole corpus and cannot be compared with "
                    "those of another part; use one index, or a dense one"
                )
            try:
                parts.append(_Part.model_validate(answer))
            except ValidationError as error:
                wrong = ", ".join(sorted({".".join(map(str, fault["loc"])) for fault in error.errors()}))
                raise SiopConfigError(
                    f"{url} is no retriever of this project with a dense index: its /health lacks, or has wrong, "
                    f"{wrong}: {answer!r:.200}"
                ) from error
            for sha256 in parts[-1].corpora():
                if sha256 in seen:
                    raise SiopConfigError(f"{url} and {seen[sha256]} serve the same corpus: every hit would come twice")
                seen[sha256] = url
            if not parts[-1].same_encoder(parts[0]):
                raise SiopConfigError(f"{url} and {self._urls[0]} have different encoders, whose scores differ too")
        facts = {
            "kind": "sharded",
            "corpus_sha256": hashlib.sha256("".join(seen).encode()).hexdigest(),
            "encoder": health[0]["encoder"],
            "shards": [{name: value for name, value in one.items() if name not in _NO_FACTS} for one in health],
        }
        return facts, sum(part.documents for part in parts)

    def __len__(self) -> int:
        return self._documents

    def facts(self) -> dict[str, Any]:
        """What /health tells, once every shard has said that its index is what it was; no address is in it.

        Raises:
            ShardUnavailable: one does not answer, or has another index (:class:`ShardChanged`).
        """
        for url, answer, expected in zip(self._urls, self._pool.map(self._health, self._urls), self._ids, strict=True):
            if index_id(answer) != expected:
                raise ShardChanged(url, 1, "another index")
        return self._facts

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The best ``k`` documents of each query, best first.

        Raises:
            ShardUnavailable: a shard did not answer, even when asked twice, or has another index than at the start.
            SiopError: it answered something that is no result.
        """
        body = {"queries": list(queries), "topk": k, "return_scores": True}

        def ask(url: str, expected: str) -> list[Hits]:
            answer, headers = self._json(url, self._http.post, "/retrieve", json=body)
            if headers.get(INDEX_HEADER) != expected:
                raise ShardChanged(url, 1, "another index")
            try:
                found = [[(hit["document"], float(hit["score"])) for hit in hits] for hits in answer["result"]]
            except (KeyError, TypeError, ValueError) as error:
                raise SiopError(f"{url} sent no list of hits with document and score: {answer!r:.200}") from error
            if len(found) != len(queries):
                raise SiopError(f"{url} sent {len(found)} results for {len(queries)} queries")
            return found

        by_shard = list(self._pool.map(ask, self._urls, self._ids))
        return [merge([hits[i] for hits in by_shard], k) for i in range(len(queries))]

    def _health(self, url: str) -> dict[str, Any]:
        answer, _ = self._json(url, self._http.get, "/health")
        if not isinstance(answer, dict):
            raise SiopConfigError(f"{url} is no retriever of this project: its /health is {answer!r:.200}")
        return answer

    def _json(
        self, url: str, send: Callable[..., httpx.Response], path: str, **kwargs: Any
    ) -> tuple[Any, httpx.Headers]:
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
                    return response.json(), response.headers
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
