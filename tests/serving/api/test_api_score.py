from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from ray import serve

from detox_ray.errors import ConfigError
from detox_ray.rewards.classifiers import load_classifier
from detox_ray.serving.api_config import ApiConfig, LimitsConfig

from .conftest import WORDS, linear

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("local_ray")]

RUDE, CIVIL = "you are a stupid idiot", "thank you for the kind help"
LIMITS = LimitsConfig()


def members(config: ApiConfig) -> dict[str, Any]:
    return {c.name: load_classifier(c, "cpu") for c in config.reward.classifiers}


def test_scores_of_a_list(client: httpx.Client, api_config: ApiConfig) -> None:
    texts = [RUDE, CIVIL, ""]
    response = client.post("/v1/score", json={"texts": texts, "toxicity": True})
    assert response.status_code == 200
    results = response.json()["results"]
    assert [sorted(r) for r in results] == [["disagreement", "per_classifier", "score", "toxicity"]] * 3
    for name, classifier in members(api_config).items():
        assert [r["per_classifier"][name] for r in results] == pytest.approx(classifier.score(texts), abs=1e-4)
        assert [r["toxicity"][name] for r in results] == pytest.approx(classifier.toxicity(texts), abs=1e-5)
    for result in results:
        values = list(result["per_classifier"].values())
        assert result["score"] == pytest.approx(sum(values) / 2, abs=1e-6)
        assert result["disagreement"] == pytest.approx(abs(values[0] - values[1]) / 2, abs=1e-6)
    assert results[0]["score"] < results[1]["score"]


def test_one_text_and_the_models_that_scored_it(client: httpx.Client) -> None:
    body = client.post("/v1/score", json={"text": CIVIL}).json()
    [result] = body["results"]
    assert "toxicity" not in result
    assert body["models"]["words"]["model"] == "profanity_check:predict_prob"
    assert body["models"]["words"]["revision"].startswith("alt-profanity-check==")
    assert body["models"]["tiny"]["revision"].startswith("sha256:")
    assert "/" not in body["models"]["tiny"]["model"]


def test_a_prompt_is_read_with_its_response(client: httpx.Client, api_config: ApiConfig) -> None:
    request = {"prompt": RUDE, "text": CIVIL, "toxicity": True}
    [result] = client.post("/v1/score", json=request).json()["results"]
    for name, classifier in members(api_config).items():
        assert result["toxicity"][name] == pytest.approx(classifier.toxicity([f"{RUDE} {CIVIL}"])[0], abs=1e-5)
    both = client.post("/v1/score", json={"prompts": [RUDE, ""], "texts": [CIVIL, CIVIL], "toxicity": True}).json()
    assert both["results"][0] == result
    assert both["results"][1]["toxicity"]["words"] < result["toxicity"]["words"]


def test_spans_and_verdict(client: httpx.Client, api_config: ApiConfig) -> None:
    text = f"{CIVIL.capitalize()}. 😀 {RUDE}!"
    [result] = client.post("/v1/score", json={"text": text, "spans": True, "threshold": 0.5, "toxicity": True}).json()[
        "results"
    ]
    assert [text[s["begin"] : s["end"]] for s in result["spans"]] == [f"{CIVIL.capitalize()}.", f"😀 {RUDE}!"]
    for span in result["spans"]:
        part = text[span["begin"] : span["end"]]
        expected = [c.toxicity([part])[0] for c in members(api_config).values()]
        assert span["toxicity"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert result["verdict"]["toxicity"] == pytest.approx(np.mean(list(result["toxicity"].values())))
    assert result["verdict"]["toxic"] == (result["verdict"]["toxicity"] >= 0.5)


def test_a_long_text_is_read_to_its_end_and_the_answer_says_in_how_many_windows(client: httpx.Client) -> None:
    text = f"{CIVIL} " * 30 + RUDE
    response = client.post("/v1/score", json={"texts": [text, CIVIL], "toxicity": True})
    long, short = response.json()["results"]
    # 185 tokens in windows of 30 that share 8.
    assert long["windows"] == {"words": 1, "tiny": 9}
    assert response.headers["x-text-windows"] == "9"
    assert long["toxicity"]["tiny"] > 0.9 > 0.1 > short["toxicity"]["tiny"]
    assert "windows" not in short


@pytest.mark.parametrize(
    ("body", "code", "field", "limit"),
    [
        ({}, "invalid_field", "body", None),
        ({"text": "a", "texts": ["a"]}, "invalid_field", "body", None),
        ({"texts": []}, "invalid_field", "texts", None),
        ({"texts": ["a"] * (LIMITS.texts + 1)}, "too_many_texts", "texts", LIMITS.texts),
        ({"text": "secret " * LIMITS.characters}, "text_too_long", "text", LIMITS.characters),
        ({"texts": ["a", "secret " * LIMITS.characters]}, "text_too_long", "texts.1", LIMITS.characters),
        ({"text": "a", "prompt": "secret " * LIMITS.characters}, "text_too_long", "prompt", LIMITS.characters),
        ({"texts": ["a b. " * 100] * 1000, "spans": True}, "too_many_spans", "spans", LIMITS.queued_texts),
        ({"text": "secret", "model": "another"}, "unknown_field", "model", None),
        ({"texts": ["secret", 3]}, "invalid_field", "texts.1", None),
        ({"texts": "secret"}, "invalid_field", "texts", None),
        ({"text": "secret", "prompts": ["a"]}, "invalid_field", "body", None),
        ({"texts": ["secret"], "prompts": ["a", "b"]}, "invalid_field", "body", None),
        ({"text": "secret", "threshold": 2}, "invalid_field", "threshold", None),
    ],
)
def test_requests_outside_the_limits(client: httpx.Client, body: dict, code: str, field: str, limit: Any) -> None:
    response = client.post("/v1/score", json=body)
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["code"], error["field"], error["limit"]) == (code, field, limit)
    assert response.json()["detail"] == error["message"]
    assert "secret" not in response.text


def test_limits_are_inclusive(client: httpx.Client) -> None:
    assert client.post("/v1/score", json={"texts": ["a" * LIMITS.characters]}).status_code == 200
    many = [str(i) for i in range(LIMITS.texts)]
    assert len(client.post("/v1/score", json={"texts": many}).json()["results"]) == LIMITS.texts


def test_a_failing_classifier_is_unavailable_not_harmless(deploy: Callable[..., str]) -> None:
    address = deploy([linear("broken", "faulty:always_fails")])
    with httpx.Client(base_url=address, timeout=60) as asking:
        for path, body in {
            "/v1/score": {"text": "secret"},
            "/v1/moderations": {"input": "secret"},
            "/v1alpha1/comments:analyze": {"comment": {"text": "secret"}, "requestedAttributes": {"TOXICITY": {}}},
        }.items():
            response = asking.post(path, json=body)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert set(response.json()) - {"detail"} == {"error"}
        assert asking.get("/healthz").status_code == 200
        assert asking.get("/readyz").status_code == 503


def test_the_deployed_module(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3])
    from deployments.toxicity_api import app

    tree = {
        "data": {"source": "prompts.jsonl"},
        "policy": {"model": "some/model"},
        "reward": {"classifiers": [linear("rude_words", "faulty:rude_words").model_dump()]},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("DETOX_RAY_CONFIG", str(path))
    serve.run(app({}), name="deployed", route_prefix="/deployed")
    [result] = httpx.post(f"{address}/deployed/v1/score", json={"text": RUDE}, timeout=60).json()["results"]
    serve.delete("deployed")
    assert result["per_classifier"] == pytest.approx({"rude_words": 0.1})


def test_a_calibration_reaches_every_format_but_not_the_score(deploy: Callable[..., str]) -> None:
    model = {"model": "faulty:rude_words", "revision": "unversioned", "label": "toxic", "label_means": "toxic"}
    halve = {"method": "isotonic", "knots": [[0, 0], [1, 0.5]], "texts": 100, "toxic": 40}
    table = {
        "models": {"rude_words": {**model, "temperature": 1}},
        "classifiers": {"rude_words": {"method": "temperature", "temperature": 0.5, "texts": 100, "toxic": 40}},
        "attributes": {"TOXICITY": {**halve, "classifiers": ["rude_words"]}},
    }
    # The odds 9 : 1 are squared.
    toxicity = 81 / 82
    with httpx.Client(base_url=deploy([linear("rude_words", "faulty:rude_words")], calibration=table)) as asking:
        request = {"text": RUDE, "toxicity": True, "spans": True, "threshold": 0.49}
        [result] = asking.post("/v1/score", json=request).json()["results"]
        assert result["toxicity"] == {"rude_words": pytest.approx(toxicity)}
        # The service's TOXICITY.
        assert result["verdict"] == {"toxicity": pytest.approx(toxicity / 2), "threshold": 0.49, "toxic": True}
        assert result["spans"][0]["toxicity"] == pytest.approx(toxicity / 2)
        assert result["per_classifier"] == pytest.approx({"rude_words": 0.1})
        request = {"comment": {"text": RUDE}, "requestedAttributes": {"TOXICITY": {}}}
        scores = asking.post("/v1alpha1/comments:analyze", json=request).json()["attributeScores"]
        assert scores["TOXICITY"]["summaryScore"]["value"] == pytest.approx(toxicity / 2)
        [result] = asking.post("/v1/moderations", json={"input": RUDE}).json()["results"]
        assert result["category_scores"]["harassment"] == pytest.approx(toxicity)
    table["models"]["rude_words"]["temperature"] = 2
    with pytest.raises(ConfigError, match=r"fitted with temperature=2\.0, but the service has 1\.0"):
        deploy([linear("rude_words", "faulty:rude_words")], calibration=table)


def test_the_words_member_is_another_librarys_number(client: httpx.Client) -> None:
    import profanity_check

    [result] = client.post("/v1/score", json={"text": RUDE, "toxicity": True}).json()["results"]
    assert result["toxicity"][WORDS.name] == pytest.approx(profanity_check.predict_prob([RUDE])[0], abs=1e-5)
