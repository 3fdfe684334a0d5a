"""One text a request to Perspective API: rate limit, retries, and what its answers mean.

Formats: https://developers.perspectiveapi.com/s/about-the-api-methods. Neither the key nor a text is ever part of an
error message or a log line.
"""

import logging
import random
import re
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from detox_ray.classifier_config import PerspectiveConfig
from detox_ray.errors import RewardError, first_line

BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
# Who is asked to wait longer has used up a quota and should know.
MAX_RETRY_AFTER_S = 600.0
EMPTY, TOO_LONG = "COMMENT_EMPTY", "COMMENT_TOO_LONG"
# Published error types that mean the text, not the request, cannot be scored; and messages of errors without a type.
REFUSALS = {
    "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE": r"does not support request languages",
    "LANGUAGE_DETECTION_FAILED": r"unable to detect language",
    TOO_LONG: r"comment text (is |was )?too (long|many bytes)",
    EMPTY: r"comment must be non-empty",
}
CODE_NAME = re.compile(r"[A-Z][A-Z_]{1,99}")

# Probabilities by attribute, or the reason why there are none.
Answer = dict[str, float] | str


class PerspectiveClient:
    """Asks a server that speaks Perspective's protocol; threads may share it."""

    def __init__(self, name: str, settings: PerspectiveConfig, key: str | None) -> None:
        self._where = f"classifier {name!r}: {settings.address}"
        self._settings = settings
        self._key = key
        self._rate = RateLimit(settings.requests_per_second)
        self._http = httpx.Client(timeout=settings.timeout_s)

    def ask(self, text: str, stopped: threading.Event) -> Answer:
        """The attributes of one text, or why it is refused; gives up once `stopped` is set.

        Raises:
            RewardError: the server failed more than `retries` times, or refuses the request whatever the text.
        """
        failure = "an interruption"
        for attempt in range(self._settings.retries + 1):
            if not self._rate.wait(stopped):
                break
            pause_s = min(MAX_BACKOFF_S, BACKOFF_S * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                response = self._post(text)
            except httpx.TransportError as error:
                failure = self._without_key(f"{type(error).__name__} {first_line(error)}")
            else:
                if response.status_code == 200:
                    return self._scores(response)
                if response.status_code != 429 and response.status_code < 500:
                    return self._refusal(response)
                failure = f"status {response.status_code}"
                asked_s = _retry_after_s(response)
                if asked_s is not None and asked_s > MAX_RETRY_AFTER_S:
                    raise RewardError(
                        f"{self._where} asks to wait {asked_s:.0f} s ({failure}); "
                        "start again then: what is scored is kept"
                    )
                pause_s = pause_s if asked_s is None else asked_s
            # A server that fails one thread fails all of them.
            self._rate.pause(pause_s)
        raise RewardError(
            f"{self._where} failed {self._settings.retries + 1} times, at last with {failure}; "
            "start again when it answers: what is scored is kept"
        )

    def _post(self, text: str) -> httpx.Response:
        languages = {"languages": self._settings.languages} if self._settings.languages else {}
        return self._http.post(
            f"{self._settings.address}/v1alpha1/comments:analyze",
            params={} if self._key is None else {"key": self._key},
            json={
                "comment": {"text": text},
                "requestedAttributes": {name: {} for name in self._settings.attributes},
                "doNotStore": True,
                **languages,
            },
        )

    def _scores(self, response: httpx.Response) -> dict[str, float]:
        """The summary score of each attribute; raises RewardError if one is missing or no probability."""
        try:
            answered = response.json()["attributeScores"]
            scores = {name: float(answered[name]["summaryScore"]["value"]) for name in self._settings.attributes}
        except (ValueError, KeyError, TypeError):
            scores = {}
        if not scores or not all(0.0 <= score <= 1.0 for score in scores.values()):
            raise RewardError(
                f"{self._where} did not answer a probability for each of {', '.join(self._settings.attributes)}; "
                "does it speak Perspective's protocol, and know these attributes?"
            )
        return scores

    def _refusal(self, response: httpx.Response) -> str:
        """Why the text cannot be scored; raises RewardError where the request is refused, not the text."""
        error = _error(response)
        found = error.get("details")
        details = [detail for detail in found if isinstance(detail, dict)] if isinstance(found, list) else []
        if response.status_code == 400:
            message = " ".join(str(error.get("message", "")).split())
            types = [detail.get("errorType") for detail in details]
            for reason, pattern in REFUSALS.items():
                if reason in types or (not any(types) and re.search(pattern, message, re.IGNORECASE)):
                    return reason
        # The message may quote the text, or a part of it; the names of codes do not.
        codes = [error.get("status"), *(detail.get(key) for detail in details for key in ("errorType", "reason"))]
        named = ", ".join(code for code in codes if isinstance(code, str) and CODE_NAME.fullmatch(code))
        said = f" ({named})" if named else ""
        key = f" and the key in {self._settings.api_key_env}" if self._key else ""
        raise RewardError(
            f"{self._where} answered status {response.status_code}{said}; check the perspective settings{key}"
        )

    def _without_key(self, message: str) -> str:
        return message.replace(self._key, "...") if self._key else message


class RateLimit:
    """Lets threads pass one at a time, no closer together than 1 / `per_second` seconds."""

    def __init__(self, per_second: float) -> None:
        self._interval_s = 1.0 / per_second
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stopped: threading.Event) -> bool:
        """Returns True when it is the caller's turn, and False as soon as `stopped` is set."""
        while not stopped.is_set():
            with self._lock:
                delay_s = self._next - time.monotonic()
                if delay_s <= 0:
                    self._next = time.monotonic() + self._interval_s
                    return True
            stopped.wait(delay_s)
        return False

    def pause(self, seconds: float) -> None:
        """Nobody passes for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _error(response: httpx.Response) -> dict[str, Any]:
    """The body's `error` object, empty if it has none."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds in the Retry-After header, which holds a number or a date (RFC 9110, 10.2.3)."""
    value = response.headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _hide_key(record: logging.LogRecord) -> bool:
    """httpx logs the address of every request, and with it the key."""
    if isinstance(record.args, tuple):
        record.args = tuple(arg.copy_remove_param("key") if isinstance(arg, httpx.URL) else arg for arg in record.args)
    return True


logging.getLogger("httpx").addFilter(_hide_key)
