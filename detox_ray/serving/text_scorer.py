"""From texts to what every classifier says of them: cache, queue bound, batches, time limit."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence

from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from detox_ray.records import Readings
from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.api_errors import ApiError, invalid
from detox_ray.serving.api_metrics import ApiMetrics
from detox_ray.serving.batcher import TextBatcher
from detox_ray.serving.readings import TextReading, text_readings
from detox_ray.serving.replica_errors import RESTART_POLL_S
from detox_ray.serving.result_cache import ResultCache
from detox_ray.serving.texts import Span, sentence_spans

logger = logging.getLogger(__name__)

# Nobody is told to come back later than this; the queue may be empty again long before.
LONGEST_RETRY_S = 30.0
PROBE = "thank you"
PROBE_TIMEOUT_S = 5.0
# So long after the last answer the classifiers count as ready without being asked; longer while they read texts.
READY_FOR_S = 10.0


class TextScorer:
    """Reads texts through the ensemble's handle, for all APIs of one HTTP replica."""

    def __init__(self, ensemble: DeploymentHandle, config: ApiConfig, metrics: ApiMetrics, release: str = "") -> None:
        """`release` is that of the classifiers whose answers may be kept; others answer during an update."""
        self._ensemble = ensemble
        self._own = frozenset({release})
        self._config = config
        self._limits = config.limits
        self._labels: dict[str, set[str]] = {classifier.name: set() for classifier in config.reward.classifiers}
        for source in config.sources.values():
            if source.classifier is not None and source.label is not None:
                self._labels[source.classifier].add(source.label)
        self._metrics = metrics
        self._cache: ResultCache[TextReading] = ResultCache(config.cache_texts)
        self._batches = TextBatcher(self._read, config.batching.texts, config.batching.in_flight)
        self._queued = 0
        self._seconds_per_text = 0.01
        self._last_answer = -math.inf
        self._probe: asyncio.Task[list[TextReading]] | None = None

    async def read(self, texts: Sequence[str], remember: bool = True) -> list[TextReading]:
        """One reading a text; `remember` says whether the cache may keep it.

        Raises:
            ApiError: 429 when too many texts are under way, 503 when a classifier fails, 504 when it takes too long.
        """
        self._metrics.texts.inc(len(texts))
        found = [self._cache.get(text) for text in texts]
        # A text that is in the request twice is read once.
        missing = list(dict.fromkeys(text for text, reading in zip(texts, found, strict=True) if reading is None))
        self._metrics.cache_hits.inc(sum(reading is not None for reading in found))
        if not missing:
            return [reading for reading in found if reading is not None]
        fresh = dict(zip(missing, await self._answers(missing), strict=True))
        if remember:
            for text, reading in fresh.items():
                if reading.releases == self._own:
                    self._cache.put(text, reading)
        return [reading or fresh[text] for text, reading in zip(texts, found, strict=True)]

    async def read_with_spans(
        self, read_as: Sequence[str], texts: Sequence[str], spans: bool, remember: bool = True
    ) -> tuple[list[TextReading], list[list[tuple[Span, TextReading]]]]:
        """Readings of `read_as`, and with `spans` those of every sentence of `texts` (else empty lists).

        Raises:
            ApiError: as `read`; 422 when there are more spans than can ever be queued.
        """
        where = [sentence_spans(text, self._limits.spans) if spans else [] for text in texts]
        parts = [text[begin:end] for text, found in zip(texts, where, strict=True) for begin, end in found]
        most = self._limits.queued_texts
        if len(read_as) + len(parts) > most:
            message = f"{len(read_as)} texts have {len(parts)} spans; together at most {most}: send fewer texts"
            raise invalid("too_many_spans", message, "spans", most)
        readings = iter(await self.read([*read_as, *parts], remember))
        whole = [next(readings) for _ in read_as]
        return whole, [[(span, next(readings)) for span in found] for found in where]

    async def is_ready(self) -> bool:
        """Whether the classifiers answer, or did a moment ago."""
        # Behind many texts a probe would wait as long as they take.
        enough_s = max(READY_FOR_S, self._limits.timeout_s) if self._queued else READY_FOR_S
        if time.monotonic() - self._last_answer < enough_s:
            return True
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(asyncio.wait_for(self._read([PROBE]), self._limits.timeout_s))
        try:
            await asyncio.wait_for(asyncio.shield(self._probe), PROBE_TIMEOUT_S)
        except (TimeoutError, ApiError):
            return False
        return True

    async def _answers(self, texts: list[str]) -> list[TextReading]:
        most = self._limits.queued_texts
        if self._queued and self._queued + len(texts) > most:
            wait_s = min(LONGEST_RETRY_S, self._queued * self._seconds_per_text)
            message = f"{self._queued} texts are under way and at most {most} may be; try again later"
            raise ApiError(429, "queue_full", message, limit=most, retry_after_s=wait_s)
        self._queue(len(texts))
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._batches(texts)
        except TimeoutError:
            message = f"the classifiers did not answer within {self._limits.timeout_s:g} s; send fewer or shorter texts"
            raise ApiError(504, "timeout", message, limit=self._limits.timeout_s) from None
        finally:
            self._queue(-len(texts))

    def _queue(self, texts: int) -> None:
        self._queued += texts
        self._metrics.queued.set(self._queued)

    async def _read(self, texts: list[str]) -> list[TextReading]:
        """The readings of one batch."""
        start = time.monotonic()
        readings = text_readings(await self._ask(texts, start + self._limits.timeout_s), self._config.calibration)
        self._last_answer = time.monotonic()
        seconds = self._last_answer - start
        self._seconds_per_text += 0.2 * (seconds / len(texts) - self._seconds_per_text)
        self._metrics.batch_texts.observe(len(texts))
        self._metrics.batch_seconds.observe(seconds)
        self._metrics.windows.inc(sum(max(r.windows.values()) for r in readings if max(r.windows.values()) > 1))
        return readings

    async def _ask(self, texts: list[str], deadline: float) -> dict[str, list[Readings]]:
        """The ensemble's answer; an ensemble that is lost is asked again until `deadline`.

        So is one that lacks a classifier or a label of this configuration: an update replaces HTTP replicas, ensemble
        and classifiers one after the other.

        Raises:
            ApiError: 503 when the ensemble fails, or still lacks something at `deadline`.
        """
        while True:
            try:
                answer = await self._ensemble.read.remote(texts)
                if (missing := self._missing(answer)) is None:
                    return {name: parts for name, parts in answer.items() if name in self._labels}
                if time.monotonic() + RESTART_POLL_S > deadline:
                    message = f"{missing} is not served; the service is being updated, try again later"
                    raise ApiError(503, "classifier_unavailable", message, retry_after_s=1)
                await asyncio.sleep(RESTART_POLL_S)
            except (RayError, RayServeException) as error:
                if isinstance(error, TaskCancelledError):
                    raise
                # Its message may quote a text.
                logger.error("scoring failed: %s", type(error).__name__)
                if isinstance(error, RayTaskError) or time.monotonic() + RESTART_POLL_S > deadline:
                    message = "a classifier does not answer; try again later"
                    raise ApiError(503, "classifier_unavailable", message, retry_after_s=1) from None
                await asyncio.sleep(RESTART_POLL_S)

    def _missing(self, answer: dict[str, list[Readings]]) -> str | None:
        """What the answer lacks of this configuration, if anything; of several replicas one may be an old one."""
        for name, labels in self._labels.items():
            if name not in answer:
                return f"classifier {name!r}"
            wanted = labels | answer[name][0].labels.keys()
            if lacking := {label for part in answer[name] for label in wanted - part.labels.keys()}:
                return f"label {min(lacking)!r} of classifier {name!r}"
        return None
