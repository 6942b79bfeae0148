"""Searches of many threads in few batches, and a memory of the last ones."""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from cachetools import LRUCache
from verl.utils.siop.retriever.index import Hits, Index, SearchFailed
from verl.utils.siop.retriever.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_BATCH = 64
CACHE_MB = 64.0
_ENTRY_BYTES = 500  # of a remembered query, beside its text and its hits


@dataclass(frozen=True, slots=True)
class _Asked:
    query: str
    k: int
    answer: Future[Hits] = field(default_factory=Future)


class BatchedIndex:
    """An index whose searches are made in batches: one thread per device takes what waits, and never waits for more.

    So one query on an idle machine is searched at once, and under load batches grow by themselves. Equal queries of a
    batch are searched once.

    Args:
        indexes: the same index on each device; each is searched by one thread.
        max_batch: queries of one search.
        cache_mb: memory for hits of earlier queries, the least recently used leave first; 0 for none.
        metrics: counts, if any.
    """

    def __init__(
        self,
        indexes: Sequence[Index],
        *,
        max_batch: int = MAX_BATCH,
        cache_mb: float = CACHE_MB,
        metrics: Metrics | None = None,
    ) -> None:
        self._documents, self._max_batch = len(indexes[0]), max_batch
        self._metrics = metrics or Metrics()
        # Hits as JSON, which they came from: it takes the memory that its length says.
        self._cache: LRUCache[tuple[str, int], tuple[bytes, int]] = LRUCache(cache_mb * 2**20, getsizeof=lambda e: e[1])
        self._lock, self._closed = threading.Lock(), False
        self._queue: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._metrics.watch_queue(self._queue.qsize)
        self._threads = [threading.Thread(target=self._work, args=(index,), daemon=True) for index in indexes]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        return self._documents

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The best ``k`` documents of each query, best first.

        Raises:
            SearchFailed: the search of one of these queries failed.
        """
        found: dict[str, Hits] = {}
        asked: dict[str, _Asked] = {}
        with self._lock:
            if self._closed:
                raise SearchFailed("the index is closed")
            for query in dict.fromkeys(queries):
                remembered = self._cache.get((query, k))
                if remembered is None:
                    asked[query] = _Asked(query, k)
                    self._queue.put(asked[query])
                else:
                    found[query] = [(document, score) for document, score in json.loads(remembered[0])]
        self._metrics.queries.inc(len(queries))
        self._metrics.cache_hits.inc(sum(query in found for query in queries))
        for query, waiting in asked.items():
            try:
                found[query] = waiting.answer.result()
            except Exception as error:
                raise SearchFailed(f"the search failed: {type(error).__name__}: {error}") from error
        for query in asked if self._cache.maxsize else ():
            text = json.dumps(found[query]).encode()
            size = sys.getsizeof(text) + sys.getsizeof(query) + _ENTRY_BYTES
            if size <= self._cache.maxsize:
                with self._lock:
                    self._cache[query, k] = text, size
        return [found[query] for query in queries]

    def close(self) -> None:
        """Ends the threads after what was asked before."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, index: Index) -> None:
        while (first := self._queue.get()) is not None:
            batch, last = [first], False
            while len(batch) < self._max_batch and not last:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    last = True
                else:
                    batch.append(item)
            self._answer(index, batch)
            if last:
                return

    def _answer(self, index: Index, batch: list[_Asked]) -> None:
        queries = list(dict.fromkeys(asked.query for asked in batch))
        self._metrics.batch_size.observe(len(queries))
        try:
            hits = dict(zip(queries, index.search(queries, max(asked.k for asked in batch)), strict=True))
        except BaseException as error:  # handed to the caller, who raises it
            logger.exception("the search of a batch of %d queries failed", len(queries))
            if len(queries) > 1:  # one of them may be why, and the others have no part in it
                for query in queries:
                    self._answer(index, [asked for asked in batch if asked.query == query])
                return
            for asked in batch:
                asked.answer.set_exception(error)
            return
        for asked in batch:
            asked.answer.set_result(hits[asked.query][: asked.k])
