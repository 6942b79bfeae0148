"""Counters of the retriever in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class Metrics:
    """Requests, queries, batches, and where the time of a search goes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"siop_retriever_{name}", what, labels, registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"siop_retriever_{name}", what, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Searches by status of the answer", ("status",))
        self.queries = counter("queries", "Queries of valid requests")
        self.cache_hits = counter("cache_hits", "Queries that were answered from memory")
        self.request_seconds = histogram("request_seconds", "Time of a search, its wait included", _SECONDS)
        self.batch_size = histogram("batch_size", "Different queries searched at once", (1, 2, 4, 8, 16, 32, 64))
        self.encode_seconds = histogram("encode_seconds", "Time to encode a batch", _SECONDS)
        self.search_seconds = histogram("search_seconds", "Time to search with a batch of vectors", _SECONDS)
        self._queue = Gauge("siop_retriever_queue", "Queries that wait for a batch", registry=self.registry)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Let ``length`` say how many queries wait."""
        self._queue.set_function(length)
