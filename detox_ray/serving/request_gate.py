"""What stands before every route: keys, rates, the bounded body, and errors in the format of the API asked."""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qs

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from detox_ray.serving.api_config import KeysConfig, LimitsConfig
from detox_ray.serving.api_errors import Api, ApiError, api_of, error_response, invalid
from detox_ray.serving.api_metrics import ApiMetrics

logger = logging.getLogger(__name__)

OPEN_PATHS = {"/healthz", "/readyz", "/docs", "/openapi.json", "/$discovery/rest"}
# How much of a body that is too long is thrown away, so that a client that is still sending reads the answer.
DISCARDED_BODIES = 16
# What nginx logs for a client that closed the connection; nobody receives it.
CLIENT_GONE = 499


class ApiKeys:
    """The keys that may ask, as digests, and how fast each may."""

    def __init__(
        self, digests: Sequence[bytes], config: KeysConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._digests = tuple(digests)
        self._config = config
        self._clock = clock
        self._allowance = dict.fromkeys(self._digests, (float(config.burst), clock()))

    def admit(self, scope: Scope, api: Api) -> None:
        """Raises ApiError when the request has no valid key, or its key asks too often; an open service admits all."""
        if not self._digests:
            return
        given = _key_of(scope)
        if given is None:
            where = "send it as `Authorization: Bearer KEY`, `X-API-Key: KEY` or `?key=KEY`"
            raise ApiError(
                403 if api == "perspective" else 401, "api_key_missing", f"this service needs an API key; {where}"
            )
        digest = key_digest(given)
        # Every key is compared, also after a match: the time says nothing.
        matches = [known for known in self._digests if hmac.compare_digest(known, digest)]
        if not matches:
            # Google answers 400 here.
            status = 400 if api == "perspective" else 401
            raise ApiError(status, "api_key_invalid", "API key not valid. Please pass a valid API key.", field="key")
        if self._config.requests_per_second is not None:
            self._spend(matches[0], self._config.requests_per_second)

    def _spend(self, digest: bytes, rate: float) -> None:
        tokens, since = self._allowance[digest]
        now = self._clock()
        tokens = min(float(self._config.burst), tokens + (now - since) * rate)
        if tokens < 1:
            self._allowance[digest] = (tokens, now)
            message = f"this key may make {rate:g} requests per second; try again later"
            raise ApiError(429, "rate_limited", message, limit=rate, retry_after_s=(1 - tokens) / rate)
        self._allowance[digest] = (tokens - 1, now)


class RequestGate:
    """ASGI middleware; inside it a request has a whole body of bounded length, and an error becomes an answer."""

    def __init__(self, app: ASGIApp, limits: LimitsConfig, keys: ApiKeys, metrics: ApiMetrics) -> None:
        self._app = app
        self._limits = limits
        self._keys = keys
        self._metrics = metrics
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        api = api_of(path)
        start, status = time.monotonic(), 0

        async def counted_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self._under_way += 1
        try:
            if path not in OPEN_PATHS:
                receive = await self._admitted(scope, receive, api)
            await self._app(scope, receive, counted_send)
        except ClientGoneError:
            return
        except Exception as error:
            if status:
                raise
            if not isinstance(error, ApiError):
                # Its message may quote a text.
                logger.error("%s %s failed: %s", scope["method"], api, type(error).__name__)
                error = ApiError(500, "internal", "the service failed; this is a bug of the service")
            self._metrics.refused.labels(api, error.code).inc()
            await error_response(error, api)(scope, receive, counted_send)
        finally:
            self._under_way -= 1
            self._metrics.requests.labels(api, str(status or CLIENT_GONE)).inc()
            self._metrics.seconds.labels(api).observe(time.monotonic() - start)

    async def _admitted(self, scope: Scope, receive: Receive, api: Api) -> Receive:
        """The `receive` of a request that may go on, with its body already here."""
        self._keys.admit(scope, api)
        if self._under_way > self._limits.requests:
            message = f"{self._limits.requests} requests are under way; try again later"
            raise ApiError(429, "too_many_requests", message, limit=self._limits.requests, retry_after_s=1)
        if scope["method"] != "POST":
            return receive
        _check_content_headers(Headers(scope=scope))
        body = await self._body(Headers(scope=scope), receive)
        _check_values(_parsed(body), most_values(self._limits))
        return _replay(body, receive)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body; raises ApiError when it is too long or does not come."""
        most, seconds = self._limits.request_bytes, self._limits.body_timeout_s
        length = headers.get("content-length", "0")
        too_long = ApiError(413, "body_too_large", f"the body has more than {most} bytes", field="body", limit=most)
        chunks: list[bytes] = []
        received = 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    chunk = message.get("body", b"")
                    received += len(chunk)
                    if received <= most:
                        chunks.append(chunk)
                    if received > DISCARDED_BODIES * most or not message.get("more_body", False):
                        break
        except TimeoutError:
            if received > most:
                raise too_long from None
            message_text = f"the body did not arrive within {seconds:g} s"
            raise ApiError(408, "body_timeout", message_text, field="body", limit=seconds) from None
        if received > most or (length.isdigit() and int(length) > most):
            raise too_long
        return b"".join(chunks)


class ClientGoneError(Exception):
    """The client closed the connection before its body was here; there is nobody to answer."""


def key_digest(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_of(scope: Scope) -> str | None:
    headers = Headers(scope=scope)
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    for name in ("x-api-key", "x-goog-api-key"):
        if key := headers.get(name):
            return key
    query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
    return next(iter(query.get("key", [])), None)


def _check_content_headers(headers: Headers) -> None:
    """Raises ApiError unless the body is JSON in UTF-8, as it is."""
    media_type, *parameters = [part.strip().lower() for part in headers.get("content-type", "").split(";")]
    charset = next((p.removeprefix("charset=").strip('"') for p in parameters if p.startswith("charset=")), "utf-8")
    if media_type != "application/json" or charset not in ("utf-8", "utf8"):
        message = "send `Content-Type: application/json`, in UTF-8"
        raise ApiError(415, "unsupported_media_type", message, field="Content-Type", limit="application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        message = "send the body as it is, not compressed"
        raise ApiError(415, "unsupported_encoding", message, field="Content-Encoding", limit="identity")


def _parsed(body: bytes) -> Any:
    """What `body` holds; raises ApiError unless it is JSON in UTF-8, without lone surrogates, NaN and too deep nesting.

    FastAPI parses it again, with a parser that takes UTF-16 and lone surrogates.
    """
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8 (byte {error.start})"
        raise ApiError(400, "not_utf8", message, field="body", limit="UTF-8") from None
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        code = "invalid_unicode" if "surrogate" in str(error) or "hex escape" in str(error) else "invalid_json"
        raise invalid(code, f"the body is not JSON: {error}", "body") from None


def most_values(limits: LimitsConfig) -> int:
    """The most values in the lists and objects of a body, all together, that a request may need."""
    # A text as a part of a message is 3 values beside its prompt, a span 6 in each attribute of a suggestion.
    return 1000 + 10 * limits.texts + 100 * limits.spans


def _check_values(parsed: Any, most: int) -> None:
    """Raises ApiError when there are more than `most` values, each of which validation might complain of."""
    found, unread = 0, [parsed]
    while unread:
        value = unread.pop()
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        found += len(inner)
        if found > most:
            raise invalid("too_many_values", f"the body has more than {most} values", "body", most)
        unread += inner


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` once, and then waits for the client to go."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
