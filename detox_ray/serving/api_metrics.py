"""What the service counts, in Prometheus' format; labels never hold a text or a key."""

from collections.abc import Iterator
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ApiMetrics:
    """The counters of one HTTP replica, whose name stands on each."""

    def __init__(self, replica: str = "") -> None:
        self._replica = replica
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "detox_requests", "Requests answered, by API and HTTP status", ["api", "status"], registry=self._registry
        )
        self.refused = Counter(
            "detox_refused", "Requests refused or failed, by API and code", ["api", "code"], registry=self._registry
        )
        self.seconds = Histogram(
            "detox_request_seconds", "Time to answer", ["api"], buckets=SECONDS, registry=self._registry
        )
        self.texts = Counter("detox_texts", "Texts and spans asked for", registry=self._registry)
        self.windows = Counter("detox_windows", "Windows read of texts longer than one", registry=self._registry)
        self.cache_hits = Counter("detox_cache_hits", "Texts answered from the cache", registry=self._registry)
        self.batch_texts = Histogram(
            "detox_batch_texts", "Texts in a call of the classifiers", buckets=TEXTS, registry=self._registry
        )
        self.batch_seconds = Histogram(
            "detox_batch_seconds", "Time of a call of the classifiers", buckets=SECONDS, registry=self._registry
        )
        self.queued = Gauge("detox_queued_texts", "Texts and spans under way", registry=self._registry)
        self.suggestions = Counter("detox_suggestions", "Scores suggested by clients", registry=self._registry)

    def exposition(self) -> bytes:
        """All of it as text."""
        return generate_latest(cast(CollectorRegistry, self))

    def collect(self) -> Iterator[Metric]:
        """What was counted, as `generate_latest` reads a registry."""
        for metric in self._registry.collect():
            named = [sample._replace(labels={**sample.labels, "replica": self._replica}) for sample in metric.samples]
            metric.samples = named
            yield metric
