import os
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from ray import serve

from detox_ray.config import ClassifierConfig, RewardConfig
from detox_ray.rewards.classifiers import load_classifier
from detox_ray.serving.http_api import MAX_CHARACTERS, MAX_TEXTS, build_http_app

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("local_ray")]

RUDE, CIVIL = "you are a stupid idiot", "thank you for the kind help"


def linear(name: str, model: str) -> ClassifierConfig:
    return ClassifierConfig(name=name, kind="linear", model=model, output="probability")


WORDS = linear("words", "profanity_check:predict_prob")


@pytest.fixture(scope="module")
def address(local_ray: Path) -> Iterator[str]:
    """Serve with its HTTP proxy on a free port of the loopback interface, in place of one without."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.shutdown()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx.Client]:
    config = RewardConfig(classifiers=[WORDS, linear("rude_words", "faulty:rude_words")], text="prompt_and_response")
    serve.run(build_http_app(config), name="api", route_prefix="/")
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
    serve.delete("api")


def test_scores_of_a_list(client: httpx.Client) -> None:
    response = client.post("/v1/score", json={"texts": [RUDE, CIVIL, ""], "toxicity": True})
    assert response.status_code == 200
    results = response.json()["results"]
    assert [sorted(r) for r in results] == [["disagreement", "per_classifier", "score", "toxicity"]] * 3
    expected = load_classifier(WORDS)
    assert [r["per_classifier"]["words"] for r in results] == pytest.approx(expected.score([RUDE, CIVIL, ""]), abs=1e-5)
    assert [r["toxicity"]["words"] for r in results] == pytest.approx(expected.toxicity([RUDE, CIVIL, ""]), abs=1e-5)
    for result in results:
        members = list(result["per_classifier"].values())
        assert result["score"] == pytest.approx(sum(members) / 2, abs=1e-6)
        assert result["disagreement"] == pytest.approx(abs(members[0] - members[1]) / 2, abs=1e-6)
    assert results[0]["score"] < results[1]["score"]


def test_score_of_one_text(client: httpx.Client) -> None:
    [result] = client.post("/v1/score", json={"text": CIVIL}).json()["results"]
    assert "toxicity" not in result
    assert result["score"] > 0.5


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "a", "texts": ["a"]},
        {"texts": []},
        {"texts": ["a"] * (MAX_TEXTS + 1)},
        {"text": "secret " * MAX_CHARACTERS},
        {"texts": ["a", "secret " * MAX_CHARACTERS]},
        {"text": "secret", "model": "another"},
        {"texts": ["secret", 3]},
        {"texts": "secret"},
    ],
    ids=["empty", "both", "no-text", "many", "long", "long-in-list", "unknown-key", "number", "not-a-list"],
)
def test_requests_outside_the_limits(client: httpx.Client, body: dict) -> None:
    response = client.post("/v1/score", json=body)
    assert response.status_code == 422
    assert response.json()["detail"]
    assert "secret" not in response.text


def test_limits_are_inclusive(client: httpx.Client) -> None:
    assert client.post("/v1/score", json={"texts": ["a" * MAX_CHARACTERS]}).status_code == 200
    assert len(client.post("/v1/score", json={"texts": ["a"] * MAX_TEXTS}).json()["results"]) == MAX_TEXTS


def test_not_json(client: httpx.Client) -> None:
    response = client.post("/v1/score", content=b"{", headers={"content-type": "application/json"})
    assert response.status_code == 422


def test_health(client: httpx.Client) -> None:
    response = client.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_a_failing_classifier_is_unavailable_not_harmless(client: httpx.Client, address: str) -> None:
    config = RewardConfig(classifiers=[linear("broken", "faulty:always_fails")], retries=0)
    serve.run(build_http_app(config), name="failing", route_prefix="/failing")
    response = httpx.post(f"{address}/failing/v1/score", json={"text": "secret", "toxicity": True}, timeout=60)
    serve.delete("failing")
    assert response.status_code == 503
    assert "results" not in response.json()


def test_texts_are_not_logged(client: httpx.Client, local_ray: Path) -> None:
    client.post("/v1/score", json={"text": "xyzzyplugh"})
    client.post("/v1/score", json={"text": "xyzzyplugh", "model": "another"})
    logs = [path.read_text(errors="replace") for path in (local_ray / "logs").rglob("*") if path.is_file()]
    assert any("/v1/score" in log for log in logs)
    assert not any("xyzzyplugh" in log for log in logs)


def test_the_deployed_module(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("detox_ray.data.lab")
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from deployments.toxicity_api import app

    tree = {
        "data": {"source": "prompts.jsonl"},
        "policy": {"model": "some/model"},
        "reward": {"classifiers": [linear("rude_words", "faulty:rude_words").model_dump()]},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    monkeypatch.setitem(os.environ, "DETOX_RAY_CONFIG", str(path))
    serve.run(app({}), name="deployed", route_prefix="/deployed")
    [result] = httpx.post(f"{address}/deployed/v1/score", json={"text": RUDE}, timeout=60).json()["results"]
    serve.delete("deployed")
    assert result["per_classifier"] == pytest.approx({"rude_words": 0.1})
