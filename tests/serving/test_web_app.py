"""The routes and their errors without classifiers."""

import asyncio
import re
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.api_metrics import ApiMetrics
from detox_ray.serving.http_api import build_web_app

# Nothing is started, but Ray is imported.
pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


def ask(method: str, path: str, **request: Any) -> httpx.Response:
    metrics = ApiMetrics("one")
    scorer = Mock(is_ready=AsyncMock(return_value=False))
    web = build_web_app(ApiConfig(), scorer, metrics, {}, ())

    async def answer() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(answer())


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/score/", lambda error: error["code"] == "not_found"),
        ("/v1/moderations/", lambda error: error["code"] == "not_found"),
        ("/v1alpha1/comments:analyze/", lambda error: error["status"] == "NOT_FOUND"),
    ],
)
def test_a_trailing_slash_leads_nowhere(path: str, code: Any) -> None:
    response = ask("POST", path, json={})
    assert response.status_code == 404
    assert "location" not in response.headers
    assert code(response.json()["error"])


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/score", {"POST"}), ("POST", "/healthz", {"GET", "HEAD"}), ("DELETE", "/readyz", {"GET", "HEAD"})],
)
def test_another_method_is_told_which_ones_there_are(method: str, path: str, allowed: set[str]) -> None:
    response = ask(method, path, json={})
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert set(response.headers["allow"].split(", ")) == allowed


def test_a_probe_may_ask_for_the_head_alone(recwarn: pytest.WarningsRecorder) -> None:
    assert ask("HEAD", "/healthz").status_code == ask("GET", "/healthz").status_code == 200
    assert ask("HEAD", "/readyz").status_code == ask("GET", "/readyz").status_code == 503
    assert [*ask("GET", "/openapi.json").json()["paths"]["/healthz"]] == ["get"]
    assert not [warning for warning in recwarn if "Duplicate Operation ID" in str(warning.message)]


def test_a_refused_language_comes_back_short() -> None:
    request = {"comment": {"text": "a"}, "requestedAttributes": {"TOXICITY": {}}, "languages": ["x" * 2**20, "fr"]}
    response = ask("POST", "/v1alpha1/comments:analyze", json=request)
    assert response.status_code == 400
    assert len(response.content) < 2000
    [detail, _] = response.json()["error"]["details"]
    assert detail["languageNotSupportedByAttributeError"]["requestedLanguages"] == ["x" * 35, "fr"]


def test_every_series_is_documented_and_names_its_replica() -> None:
    families = list(text_string_to_metric_families(ask("GET", "/metrics").text))
    samples = [sample for family in families for sample in family.samples]
    assert {"detox_texts_total", "detox_queued_texts"} <= {sample.name for sample in samples}
    assert {sample.labels["replica"] for sample in samples} == {"one"}
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(detox_\w+?)(?:_total)?` \|", text, re.MULTILINE))
    assert documented == {family.name for family in families if not family.name.endswith("_created")}
