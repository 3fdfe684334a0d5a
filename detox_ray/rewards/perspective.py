"""`kind: perspective`: Perspective API, or any server that speaks its protocol, as a classifier.

Every answer, also a refusal, is kept on disk before it is used, so an interrupted scoring goes on where it stopped and
no text is paid for twice. A text that cannot be scored never becomes a number: `score` and `toxicity` raise.
"""

import math
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

from detox_ray.classifier_config import ClassifierConfig, PerspectiveConfig
from detox_ray.errors import ConfigError, RewardError, first_line
from detox_ray.rewards.answer_cache import AnswerCache
from detox_ray.rewards.deadline import check_deadline, seconds_left
from detox_ray.rewards.perspective_client import EMPTY, TOO_LONG, Answer, PerspectiveClient
from detox_ray.rewards.probability import ProbabilityClassifier

# Published limit of one request ("Comment text was too many bytes").
MAX_TEXT_BYTES = 20_480
MAX_THREADS = 32
NOT_UNICODE = "NOT_UNICODE"


class PerspectiveClassifier(ProbabilityClassifier):
    """The attribute `label` as probability of toxicity; any number of threads and processes may share its cache."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config, self._read_label)
        self._settings = config.perspective or PerspectiveConfig()
        self._client = PerspectiveClient(config.name, self._settings, check_perspective(config))
        self._cache = _open_cache(config.name, self._settings)

    def answers(self, texts: Sequence[str]) -> list[Answer]:
        """All attributes of each text, probabilities in [0, 1], or why it was refused.

        Raises:
            RewardError: the server failed more than `retries` times, or refuses the request itself (such as its key).
            DeadlineError: nobody waits for it any more; what is under way is still kept.
        """
        answers: dict[str, Answer] = {}
        stopped = threading.Event()
        # An answer takes up to about a second, so this many requests under way use the rate up.
        threads = min(MAX_THREADS, math.ceil(self._settings.requests_per_second))
        pool = ThreadPoolExecutor(threads)
        try:
            futures = {pool.submit(self._answer, text, stopped): text for text in dict.fromkeys(texts)}
            for future in as_completed(futures, timeout=seconds_left()):
                answers[futures[future]] = future.result()
        except TimeoutError:
            check_deadline(self.name)
            raise
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return [answers[text] for text in texts]

    def _read_label(self, texts: list[str]) -> np.ndarray:
        """`[N] float64`, the attribute that is read as toxicity; raises RewardError if a text was refused."""
        found = self.answers(texts)
        if refused := Counter(answer for answer in found if isinstance(answer, str)):
            reasons = ", ".join(f"{count} {reason}" for reason, count in refused.most_common())
            raise RewardError(
                f"classifier {self.name!r}: {refused.total()} of {len(texts)} texts were refused ({reasons}); "
                "leave them out, or use another classifier for such texts"
            )
        return np.array([scores[str(self._config.label)] for scores in found if not isinstance(scores, str)])

    def _answer(self, text: str, stopped: threading.Event) -> Answer:
        """The scores of a text or why it was refused, from the cache or else from the server."""
        if reason := _unscorable(text):
            return reason
        settings = self._settings
        asked = [settings.address, sorted(settings.attributes), sorted(settings.languages), text]
        key = AnswerCache.key(*asked, *filter(None, [self._config.revision]))
        try:
            if (answer := self._cache.get(key)) is not None:
                return answer
            with self._cache.claim(key):
                # Another process may have asked meanwhile.
                if (answer := self._cache.get(key)) is None:
                    answer = self._client.ask(text, stopped)
                    self._cache.put(key, answer)
                return answer
        except (OSError, sqlite3.Error) as error:
            raise RewardError(
                f"classifier {self.name!r}: perspective.cache {settings.cache} failed: {first_line(error)}; "
                "is the disk full, or the file in use?"
            ) from None


def check_perspective(config: ClassifierConfig) -> str | None:
    """The key, or none where the server needs none; asks the server nothing.

    Raises:
        ConfigError: there is no key, or the cache cannot be used.
    """
    settings = config.perspective or PerspectiveConfig()
    _open_cache(config.name, settings).close()
    if settings.api_key_env is None:
        return None
    if not (key := os.environ.get(settings.api_key_env, "").strip()):
        raise ConfigError(
            f"classifier {config.name!r}: the environment variable {settings.api_key_env} holds no key for "
            f"{settings.address}; set it, or perspective.api_key_env: null for a server that needs none"
        )
    return key


def _open_cache(name: str, settings: PerspectiveConfig) -> AnswerCache:
    try:
        return AnswerCache(settings.cache)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"classifier {name!r}: perspective.cache {settings.cache} cannot be used: {first_line(error)}; "
            "give a file that can be written, or remove this one"
        ) from None


def _unscorable(text: str) -> str | None:
    """Why the server could not score a text, where that is known without asking."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return NOT_UNICODE
    return TOO_LONG if size > MAX_TEXT_BYTES else EMPTY if size == 0 else None
