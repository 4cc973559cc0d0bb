"""What Prometheus may ask of the service, in a registry of its own so that one process can hold several."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a time stamp beside every series, which nobody asks for

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = tuple(16 << power for power in range(12))  # to the 32,768 of a GPU's batch


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("distrinews_requests", "Requests by route and HTTP status.", ["route", "status"], registry=registry)
        self.latency = Histogram("distrinews_request_seconds", "From request to answer.", ["route"], buckets=_SECONDS, registry=registry)
        self.queue_wait = Histogram("distrinews_queue_wait_seconds", "A text's wait for its batch.", buckets=_SECONDS, registry=registry)
        self.batch_texts = Histogram("distrinews_batch_texts", "Texts in a batch.", buckets=_SIZES, registry=registry)
        self.batch_tokens = Histogram("distrinews_batch_tokens", "Tokens in a batch, padding included.", buckets=_TOKENS, registry=registry)
        self.tokens = Counter("distrinews_tokens", "Tokens computed, by kind: text or padding.", ["kind"], registry=registry)
        self.engine_seconds = Counter("distrinews_engine_seconds", "Time spent in the engine.", registry=registry)
        self.queue = Gauge("distrinews_queue_tokens", "Tokens accepted and not yet answered.", registry=registry)
        self.failures = Counter("distrinews_engine_failures", "Calls of the engine that raised.", registry=registry)
        self.model = Gauge("distrinews_model", "1 for the model that serves.", ["model", "commit", "engine"], registry=registry)
        self.swaps = Counter("distrinews_swaps", "Times that another commit took over.", registry=registry)
        self.refusals = Counter(
            "distrinews_refusals", "Commits that were refused: release, proof, rollback.", ["reason"], registry=registry
        )
