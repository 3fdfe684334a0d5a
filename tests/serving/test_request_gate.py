import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from detox_ray.serving.api_config import KeysConfig, LimitsConfig
from detox_ray.serving.api_errors import ApiError
from detox_ray.serving.api_metrics import ApiMetrics
from detox_ray.serving.request_gate import ApiKeys, RequestGate, key_digest, most_values

pytestmark = pytest.mark.unit

JSON = {"content-type": "application/json"}
LIMITS = LimitsConfig(request_bytes=1024, body_timeout_s=0.2, requests=2)


def client(keys: tuple[str, ...] = (), limits: LimitsConfig = LIMITS) -> httpx.AsyncClient:
    """Of an app that answers with the length of the body, behind the gate."""

    async def length(request: Request) -> JSONResponse:
        await asyncio.sleep(0.05)
        return JSONResponse(len(await request.body()))

    async def broken(request: Request) -> JSONResponse:
        raise RuntimeError("xyzzyplugh")

    paths = ["/v1/score", "/v1/moderations", "/v1alpha1/comments:analyze"]
    routes = [Route(path, length, methods=["POST"]) for path in paths]
    admitted = ApiKeys([key_digest(key) for key in keys], KeysConfig())
    gate = Middleware(RequestGate, limits=limits, keys=admitted, metrics=ApiMetrics())
    app = Starlette(routes=[*routes, Route("/broken", broken), Route("/healthz", length)], middleware=[gate])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def post(
    path: str = "/v1/score", keys: tuple[str, ...] = (), limits: LimitsConfig = LIMITS, **request: Any
) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client(keys, limits) as asking:
            return await asking.post(path, **{"headers": JSON, "content": b"{}", **request})

    return asyncio.run(ask())


async def in_chunks(*chunks: bytes, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
        await asyncio.sleep(pause_s)


def test_a_body_arrives_whole() -> None:
    body = b'{"text":"' + b"a" * 1000 + b'"}'
    assert post(content=body).json() == len(body)
    assert post(content=in_chunks(body[:5], body[5:])).json() == len(body)


@pytest.mark.parametrize("content", [b'"' + b"a" * 1023 + b'"', in_chunks(b"a" * 600, b"a" * 600)])
def test_a_body_that_is_too_long_is_refused(content: Any) -> None:
    response = post(content=content)
    assert response.status_code == 413
    assert response.json()["error"] == {
        "code": "body_too_large",
        "message": "the body has more than 1024 bytes",
        "field": "body",
        "limit": 1024,
    }


def test_a_body_that_does_not_come_is_refused() -> None:
    response = post(content=in_chunks(b"{", b"}", pause_s=1))
    assert (response.status_code, response.json()["error"]["code"]) == (408, "body_timeout")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b"[" * 1000, "invalid_json"),
        (b'{"text": NaN}', "invalid_json"),
        (b'{"text": "\xff"}', "not_utf8"),
        ('{"text": "a"}'.encode("utf-16"), "not_utf8"),
        ('{"text": "a"}'.encode("utf-16-le"), "invalid_json"),
        (b'{"text": "\\ud800"}', "invalid_unicode"),
        (b'{"\\udc00": "a"}', "invalid_unicode"),
    ],
)
def test_what_is_not_json_in_utf8_is_refused(content: bytes, code: str) -> None:
    response = post(content=content)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["code"] == code


SMALL = LimitsConfig(texts=2, spans=1)
SPAN = {"begin": 0, "end": 1, "score": {"value": 0, "type": "PROBABILITY"}}


@pytest.mark.parametrize(
    "body",
    [
        {"input": [0] * most_values(SMALL)},
        {"input": [[]] * most_values(SMALL)},
        {"input": [[[0] * 100] * 10] * 10},
        {"input": [{"a": 0, "b": {"c": 0}}] * (most_values(SMALL) // 3)},
        dict.fromkeys(map(str, range(most_values(SMALL) + 1)), 0),
        [0] * (most_values(SMALL) + 1),
    ],
    ids=lambda body: json.dumps(body)[:24],
)
def test_more_values_than_any_request_needs_are_refused(body: Any) -> None:
    response = post("/v1/moderations", limits=SMALL, content=json.dumps(body).encode())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "too_many_values")
    assert response.json()["error"]["limit"] == most_values(SMALL)


@pytest.mark.parametrize(
    "limits", [LimitsConfig(), LimitsConfig(texts=1, spans=500), LimitsConfig(texts=3000, spans=1)]
)
def test_the_longest_requests_of_all_apis_have_few_enough_values(limits: LimitsConfig) -> None:
    texts = ["a"] * limits.texts
    attributes = {f"A{i}": {"summaryScore": SPAN["score"], "spanScores": [SPAN] * limits.spans} for i in range(16)}
    for path, body in (
        ("/v1/score", {"texts": texts, "prompts": texts, "spans": True}),
        ("/v1/moderations", {"input": [{"type": "text", "text": text} for text in texts]}),
        ("/v1alpha1/comments:analyze", {"comment": {"text": "a"}, "attributeScores": attributes}),
    ):
        content = json.dumps(body).encode()
        assert post(path, limits=limits, content=content).json() == len(content)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/json; charset=latin-1"},
        JSON | {"content-encoding": "gzip"},
    ],
)
def test_other_media_types_are_refused(headers: dict[str, str]) -> None:
    assert post(headers=headers).status_code == 415


@pytest.mark.parametrize(
    "request_with_key",
    [
        {"headers": JSON | {"authorization": "Bearer right"}},
        {"headers": JSON | {"x-api-key": "right"}},
        {"headers": JSON | {"x-goog-api-key": "right"}},
        {"params": {"key": "right"}},
    ],
)
def test_a_key_is_taken_from_where_clients_put_it(request_with_key: dict[str, Any]) -> None:
    assert post(keys=("other", "right"), **request_with_key).status_code == 200
    assert post(keys=("other",), **request_with_key).status_code in (400, 401)


def test_without_a_key_each_api_refuses_as_its_model_does() -> None:
    ours, openai, perspective = (
        post(path, keys=("right",)) for path in ("/v1/score", "/v1/moderations", "/v1alpha1/comments:analyze")
    )
    assert (ours.status_code, ours.json()["error"]["code"], ours.headers["www-authenticate"]) == (
        401,
        "api_key_missing",
        "Bearer",
    )
    assert (openai.status_code, openai.json()["error"]["type"]) == (401, "authentication_error")
    assert (perspective.status_code, perspective.json()["error"]["status"]) == (403, "PERMISSION_DENIED")
    wrong = post("/v1alpha1/comments:analyze", keys=("right",), params={"key": "wrong"})
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (
        400,
        "API key not valid. Please pass a valid API key.",
    )
    assert "wrong" not in wrong.text


def test_a_key_has_a_rate_of_its_own() -> None:
    now = 100.0
    config = KeysConfig(requests_per_second=0.5, burst=2)
    keys = ApiKeys([key_digest(key) for key in ("one", "two")], config, clock=lambda: now)

    def admit(key: str) -> None:
        keys.admit({"type": "http", "headers": [(b"x-api-key", key.encode())]}, "score")

    def refused_for_s(key: str) -> float | None:
        with pytest.raises(ApiError) as error:
            admit(key)
        assert (error.value.status, error.value.code, error.value.limit) == (429, "rate_limited", 0.5)
        return error.value.retry_after_s

    admit("one")
    admit("one")
    assert refused_for_s("one") == 2
    admit("two")
    now += 1
    assert refused_for_s("one") == 1
    now += 1
    admit("one")
    assert refused_for_s("one") == 2


def test_health_needs_no_key() -> None:
    async def ask() -> int:
        async with client(("right",)) as asking:
            return (await asking.get("/healthz")).status_code

    assert asyncio.run(ask()) == 200


def test_more_requests_than_allowed_are_told_to_come_back() -> None:
    async def ask() -> list[httpx.Response]:
        async with client() as asking:
            return await asyncio.gather(*(asking.post("/v1/score", content=b"{}", headers=JSON) for _ in range(5)))

    responses = asyncio.run(ask())
    assert sorted(r.status_code for r in responses) == [200, 200, 429, 429, 429]
    refused = next(r for r in responses if r.status_code == 429)
    assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("too_many_requests", "1")


def test_a_bug_is_an_answer_without_its_message(caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> httpx.Response:
        async with client() as asking:
            return await asking.get("/broken")

    response = asyncio.run(ask())
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert "xyzzyplugh" not in response.text + caplog.text
