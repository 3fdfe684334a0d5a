"""Google's own Python client, unmodified, as Perspective's documentation uses it."""

from typing import Any

import httpx
import pytest
from googleapiclient import discovery
from googleapiclient.errors import HttpError

from detox_ray.rewards.classifiers import load_classifier
from detox_ray.serving.api_config import ApiConfig

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("local_ray")]

RUDE, CIVIL = "you are a stupid idiot", "thank you for the kind help"


@pytest.fixture(scope="module")
def google(client: httpx.Client) -> Any:
    return discovery.build(
        "commentanalyzer",
        "v1alpha1",
        developerKey="API_KEY",
        discoveryServiceUrl=f"{client.base_url}/$discovery/rest?version=v1alpha1",
        static_discovery=False,
    )


def test_the_documented_sample(google: Any, api_config: ApiConfig) -> None:
    request = {"comment": {"text": RUDE}, "requestedAttributes": {"TOXICITY": {}, "INSULT": {}, "PROFANITY": {}}}
    response = google.comments().analyze(body=request).execute()
    assert set(response) == {"attributeScores", "languages"}
    assert response["languages"] == ["en"]
    words, tiny = (load_classifier(c, "cpu") for c in api_config.reward.classifiers)
    expected = {
        "TOXICITY": (words.toxicity([RUDE])[0] + tiny.toxicity([RUDE])[0]) / 2,
        "INSULT": tiny.read([RUDE]).labels["toxic"][0],
        "PROFANITY": words.toxicity([RUDE])[0],
    }
    assert set(response["attributeScores"]) == set(expected)
    for name, value in expected.items():
        scores = response["attributeScores"][name]
        assert scores["summaryScore"] == {"value": pytest.approx(value, abs=1e-5), "type": "PROBABILITY"}
        assert scores["spanScores"] == [{"begin": 0, "end": len(RUDE), "score": scores["summaryScore"]}]


def test_sentences_are_annotated_in_utf16(google: Any) -> None:
    text = f"😀 {CIVIL}! {RUDE}."
    request = {"comment": {"text": text}, "requestedAttributes": {"INSULT": {}}, "spanAnnotations": True}
    spans = google.comments().analyze(body=request).execute()["attributeScores"]["INSULT"]["spanScores"]
    units = text.encode("utf-16-le")
    assert [units[2 * s["begin"] : 2 * s["end"]].decode("utf-16-le") for s in spans] == [f"😀 {CIVIL}!", f"{RUDE}."]
    assert spans[0]["score"]["value"] < 0.5 < spans[1]["score"]["value"]


def test_everything_a_request_may_hold(google: Any) -> None:
    request = {
        "comment": {"text": RUDE, "type": "PLAIN_TEXT"},
        "context": {"entries": [{"text": CIVIL}]},
        "requestedAttributes": {"PROFANITY": {"scoreType": "PROBABILITY", "scoreThreshold": 0.0}},
        "languages": ["de", "en-GB"],
        "doNotStore": True,
        "clientToken": "token",
        "sessionId": "12345",
        "communityId": "somewhere",
    }
    response = google.comments().analyze(body=request).execute()
    assert (response["clientToken"], response["sessionId"]) == ("token", "12345")
    assert response["languages"] == ["de", "en-GB"]


def test_a_score_below_the_threshold_is_left_out(google: Any) -> None:
    attributes = {"TOXICITY": {"scoreThreshold": 0.9999}, "INSULT": {}}
    request = {"comment": {"text": CIVIL}, "requestedAttributes": attributes}
    assert set(google.comments().analyze(body=request).execute()["attributeScores"]) == {"INSULT"}
    request["requestedAttributes"] = {"TOXICITY": {"scoreThreshold": 0.9999}}
    assert "attributeScores" not in google.comments().analyze(body=request).execute()


def test_snake_case_is_understood_as_in_protocol_buffers(client: httpx.Client) -> None:
    body = {"comment": {"text": RUDE}, "requested_attributes": {"INSULT": {"score_type": "PROBABILITY"}}}
    response = client.post("/v1alpha1/comments:analyze?key=any", json=body)
    assert set(response.json()["attributeScores"]) == {"INSULT"}


def test_null_is_absent_as_in_protocol_buffers(client: httpx.Client) -> None:
    absent = {"type": None}
    body = {
        "comment": {"text": RUDE} | absent,
        "context": {"entries": [{"text": "a"} | absent], "articleAndParentComment": None},
        "requestedAttributes": {"INSULT": {"scoreType": None, "score_threshold": None}},
        "languages": None,
        "spanAnnotations": None,
        "doNotStore": None,
        "clientToken": None,
    }
    response = client.post("/v1alpha1/comments:analyze", json=body)
    assert response.status_code == 200, response.text
    plain = {"comment": {"text": RUDE}, "requestedAttributes": {"INSULT": {}}}
    assert response.json() == client.post("/v1alpha1/comments:analyze", json=plain).json()
    scores = {"TOXICITY": {"summaryScore": {"value": 0, "type": None}, "spanScores": None}}
    suggestion = {"comment": {"text": RUDE}, "attributeScores": scores, "languages": None}
    assert client.post("/v1alpha1/comments:suggestscore", json=suggestion).json() == {"requestedLanguages": []}
    for changes in ({"unknown": None}, {"languages": [None]}, {"comment": None}):
        assert client.post("/v1alpha1/comments:analyze", json=body | changes).status_code == 400


ANALYZE: dict[str, Any] = {"comment": {"text": RUDE}, "requestedAttributes": {"TOXICITY": {}}}


@pytest.mark.parametrize(
    ("changes", "message", "kind"),
    [
        ({"comment": {"text": ""}}, "Comment must be non-empty.", "COMMENT_EMPTY"),
        ({"comment": {"text": "secret " * 9000}}, "Comment text too long.", "COMMENT_TOO_LONG"),
        ({"requestedAttributes": {}}, "Missing requested_attributes", "NO_REQUESTED_ATTRIBUTES"),
        ({"requestedAttributes": {"THREAT": {}}}, "Unknown requested attribute: THREAT", "INVALID_REQUEST"),
        (
            {"languages": ["en", "fr"]},
            "Attribute TOXICITY does not support request languages: fr",
            "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE",
        ),
        (
            {"requestedAttributes": {"TOXICITY": {"scoreType": "PERCENTILE"}}},
            "Requested score type PERCENTILE is not supported by attribute TOXICITY",
            "INVALID_REQUEST",
        ),
        ({"comment": {"text": "secret", "type": "HTML"}}, "only 'PLAIN_TEXT' comments", "INVALID_REQUEST"),
        ({"comment": {"text": "secret", "type": "PDF"}}, "Unknown text type", "INVALID_REQUEST"),
        (
            {"context": {"entries": [{"text": "a"}], "articleAndParentComment": {"article": {"text": "b"}}}},
            "Context can have either entries or article_and_parent_comment",
            "INVALID_REQUEST",
        ),
        ({"comment": {"text": 3}}, "comment.text", "INVALID_REQUEST"),
        ({"requestedAttributes": {"TOXICITY": {"scoreThreshold": "high"}}}, "scoreThreshold", "INVALID_REQUEST"),
        ({"commment": "secret"}, "commment", "INVALID_REQUEST"),
    ],
)
def test_refusals_are_perspectives(google: Any, changes: dict, message: str, kind: str) -> None:
    with pytest.raises(HttpError, match="400") as error:
        google.comments().analyze(body=ANALYZE | changes).execute()
    assert message in error.value.reason
    assert error.value.resp.status == 400
    perspective, info = error.value.error_details
    assert perspective["@type"] == "type.googleapis.com/google.commentanalyzer.v1alpha1.Error"
    assert perspective["errorType"] == kind
    assert info["reason"]
    assert b"secret" not in error.value.content


def test_the_refused_field_and_its_limit_are_named(client: httpx.Client) -> None:
    error = client.post("/v1alpha1/comments:analyze", json=ANALYZE | {"comment": {"text": "a" * 20_481}}).json()[
        "error"
    ]
    assert (error["code"], error["status"]) == (400, "INVALID_ARGUMENT")
    assert error["details"][1]["metadata"] == {"field": "comment.text", "limit": "20480"}
    unknown = client.post("/v1alpha1/comments:analyze", json=ANALYZE | {"requestedAttributes": {"THREAT": {}}}).json()
    metadata = unknown["error"]["details"][1]["metadata"]
    assert metadata == {"field": "requestedAttributes.THREAT", "limit": "TOXICITY, INSULT, PROFANITY"}


def suggestions(client: httpx.Client) -> float:
    [line] = [line for line in client.get("/metrics").text.splitlines() if line.startswith("detox_suggestions_total")]
    return float(line.split()[1])


def test_a_suggestion_is_taken_and_not_stored(google: Any, client: httpx.Client) -> None:
    scores = {"TOXICITY": {"summaryScore": {"value": 0}, "spanScores": [{"begin": 0, "end": 3, "score": {"value": 1}}]}}
    request = {"comment": {"text": CIVIL}, "attributeScores": scores, "languages": ["en"], "clientToken": "token"}
    counted = suggestions(client)
    response = google.comments().suggestscore(body=request).execute()
    assert response == {"requestedLanguages": ["en"], "clientToken": "token"}
    assert suggestions(client) == counted + 1
    for wrong in (
        {},
        {"THREAT": {"summaryScore": {"value": 0}}},
        {"TOXICITY": {}},
        {"TOXICITY": {"summaryScore": {"value": 2}}},
        {"TOXICITY": {"spanScores": [{"score": {"value": 1}}]}},
        {"TOXICITY": {"spanScores": [{"begin": 3, "end": 3, "score": {"value": 1}}]}},
    ):
        with pytest.raises(HttpError, match="400"):
            google.comments().suggestscore(body=request | {"attributeScores": wrong}).execute()
