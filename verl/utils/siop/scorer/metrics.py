"""Counters of the scoring service in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from verl.utils.siop.scorer.pool import WorkerPool


class Metrics:
    """Requests, tokens and pairs that were counted, and the workers of ``pool`` at the time of asking."""

    def __init__(self, pool: WorkerPool) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"siop_scorer_{name}", what, labels, registry=self.registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"siop_scorer_{name}", what, registry=self.registry)

        self.requests = counter("requests", "Requests by path and status", ("path", "status"))
        self.seconds = Histogram(
            "siop_scorer_request_seconds",
            "Time of a request",
            ["path"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )
        self.in_flight = gauge("in_flight", "Requests being worked on")
        self.computed = counter("computed_tokens", "Tokens that went through the model")
        self.requested = counter("requested_tokens", "Tokens of the same scores as full sequences")
        self.nli_asked = counter("nli_asked_pairs", "Pairs of texts that the NLI model was asked for")
        self.nli_computed = counter("nli_computed_pairs", "Those that were not known yet")
        gauge("workers", "Scoring workers that are asked for").set_function(lambda: pool.num_workers)
        gauge("workers_up", "Scoring workers that are ready").set_function(lambda: pool.num_up)
        gauge("nli_workers", "NLI workers that are asked for").set_function(lambda: pool.num_nli_workers)
        gauge("nli_workers_up", "NLI workers that are ready").set_function(lambda: pool.num_nli_up)
