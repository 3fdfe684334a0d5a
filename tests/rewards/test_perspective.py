import logging
import math
import threading
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from perspective_server import KEY, KNOWN, PerspectiveServer, config, load, published_error, score

from detox_ray.config_file import dump_config, parse_config
from detox_ray.errors import ConfigError, RewardError
from detox_ray.rewards.classifiers import check_classifier, load_classifier

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("environment")]

RUDE, CIVIL, FOREIGN = "you fool", "thank you, friend", "þú ert kjáni"
TEXTS = [RUDE, CIVIL, "what a fine day", "only a fool would say so"]
ROOT = Path(__file__).parents[2]


def test_scores_are_the_servers(server: PerspectiveServer) -> None:
    expected = np.array([score(text, "TOXICITY") for text in TEXTS])
    np.testing.assert_allclose(load(server).toxicity(TEXTS), expected, atol=1e-6)
    for output, values in {
        "probability": 1 - expected,
        "logprob": np.log(1 - expected),
        "logit": np.log((1 - expected) / expected),
    }.items():
        np.testing.assert_allclose(load(server, output=output).score(TEXTS), values, atol=1e-5)
    insult = load(server, label="INSULT").toxicity(TEXTS)
    np.testing.assert_allclose(insult, [score(text, "INSULT") for text in TEXTS], atol=1e-6)
    assert load(server).score([]).shape == (0,)
    assert server.received == dict.fromkeys(TEXTS, 1), "one request gives all attributes, for ever"


def test_all_attributes_are_kept_in_the_order_of_the_texts(server: PerspectiveServer) -> None:
    classifier = load(server)
    twice = [*TEXTS, *TEXTS[::-1]]
    assert classifier.answers(twice) == [{name: score(text, name) for name in KNOWN} for text in twice]
    assert server.received == dict.fromkeys(TEXTS, 1)


def test_the_request_is_the_published_one(server: PerspectiveServer) -> None:
    load(server, {"attributes": ["TOXICITY", "THREAT"], "languages": ["en"]}).toxicity([RUDE])
    load(server).toxicity([RUDE])
    named, detected = server.requests
    assert named == {
        "comment": {"text": RUDE},
        "requestedAttributes": {"TOXICITY": {}, "THREAT": {}},
        "languages": ["en"],
        "doNotStore": True,
    }
    assert "languages" not in detected
    assert list(detected["requestedAttributes"]) == KNOWN


def test_texts_that_cannot_be_scored(server: PerspectiveServer) -> None:
    at_the_limit, above = "a" * 20_480, "é" * 10_241
    texts = [RUDE, FOREIGN, "", above, "\ud83d", at_the_limit, "12345", FOREIGN]
    classifier = load(server)
    foreign = "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"
    assert [answer if isinstance(answer, str) else answer["TOXICITY"] for answer in classifier.answers(texts)] == [
        score(RUDE, "TOXICITY"), foreign, "COMMENT_EMPTY", "COMMENT_TOO_LONG", "NOT_UNICODE",
        score(at_the_limit, "TOXICITY"), "LANGUAGE_DETECTION_FAILED", foreign,
    ]  # fmt: skip
    for method in (classifier.score, classifier.toxicity):
        with pytest.raises(RewardError, match=r"'api': 6 of 8 texts were refused \(2 LANGUAGE_NOT_SUPPORTED") as error:
            method(texts)
        assert FOREIGN not in str(error.value)
    assert server.received == {RUDE: 1, FOREIGN: 1, at_the_limit: 1, "12345": 1}, "a refusal is not paid for twice"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Attribute INSULT does not support request languages: und", "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"),
        ("Unable to detect language.", "LANGUAGE_DETECTION_FAILED"),
        ("Comment text too long.", "COMMENT_TOO_LONG"),
        ("Comment text was too many bytes. Value (23368) exceeded limit (20480).", "COMMENT_TOO_LONG"),
        ("Comment must be non-empty.", "COMMENT_EMPTY"),
    ],
)
def test_refusals_without_an_error_type(server: PerspectiveServer, message: str, reason: str) -> None:
    server.next_answers = [(400, {}, published_error(400, message))]
    assert load(server).answers([RUDE]) == [reason]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, published_error(400, "API key not valid. Please pass a valid API key."), r"\(INVALID_ARGUMENT\)"),
        (400, published_error(400, "Unknown requested attribute: X", "INVALID_REQUEST"), "INVALID_REQUEST"),
        (403, published_error(403, "Perspective API has not been used in project 7 before"), "PERMISSION_DENIED"),
        (404, b"<html>nothing here</html>", "status 404"),
        (400, {"error": "odd"}, "status 400"),
    ],
)
def test_a_refused_request_is_not_a_refused_text(server: PerspectiveServer, status: int, body: Any, said: str) -> None:
    server.next_answers = [(status, {}, body)]
    with pytest.raises(RewardError, match=f"{status}.*{said}|{said}") as error:
        load(server, {"requests_per_second": 1}).answers(TEXTS)
    assert "check the perspective settings and the key in PERSPECTIVE_API_KEY" in str(error.value)
    assert sum(server.received.values()) == 1, "neither retried nor gone on with"


@pytest.mark.parametrize("date", [False, True], ids=["seconds", "date"])
def test_retry_after_is_honoured(server: PerspectiveServer, date: bool) -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if date else "1"
    server.next_answers = [(429, {"Retry-After": when}, published_error(429, "Quota exceeded"))]
    assert load(server).toxicity([RUDE]) == pytest.approx([0.9])
    # A date has whole seconds.
    assert 0.9 < server.arrivals[1] - server.arrivals[0] < 30


def test_a_pause_holds_for_all_threads(server: PerspectiveServer) -> None:
    server.delay_s = 0.05
    server.next_answers = [(429, {"Retry-After": "1"}, published_error(429, "Quota exceeded"))]
    load(server, {"requests_per_second": 50}).toxicity([f"day number {i}" for i in range(40)])
    after = [arrival - server.arrivals[0] for arrival in server.arrivals]
    # What was already under way when the answer came may still arrive.
    assert not [gap for gap in after if 0.5 < gap < 0.9]
    assert max(after) > 0.9


def test_a_quota_that_is_used_up_is_said_at_once(server: PerspectiveServer) -> None:
    server.next_answers = [(429, {"Retry-After": "86400"}, published_error(429, "Quota exceeded"))]
    with pytest.raises(RewardError, match="asks to wait 86400 s"):
        load(server).toxicity([RUDE])


def test_what_may_pass_is_tried_again(server: PerspectiveServer) -> None:
    busy = published_error(503, "try again")
    server.next_answers = [(503, {}, busy), (500, {}, b"oops"), (0, {}, None), (429, {}, busy)]
    assert load(server).toxicity([RUDE]) == pytest.approx([0.9])
    assert server.received == {RUDE: 5}


def test_what_does_not_pass_is_given_up(server: PerspectiveServer) -> None:
    server.next_answers = [(502, {}, b"")] * 3
    with pytest.raises(RewardError, match=r"'api': http://127.* failed 3 times, at last with status 502"):
        load(server, {"retries": 2}).toxicity([RUDE])
    assert server.received == {RUDE: 3}


def scored(toxicity: Any) -> dict[str, Any]:
    return {"attributeScores": {"TOXICITY": {"summaryScore": {"value": toxicity, "type": "PROBABILITY"}}}}


@pytest.mark.parametrize("body", [scored(float("nan")), scored(1.5), scored("high"), {"attributeScores": {}}, b"{", []])
def test_an_answer_that_is_no_score(server: PerspectiveServer, body: Any) -> None:
    server.next_answers = [(200, {}, body)]
    classifier = load(server, {"attributes": ["TOXICITY"]})
    with pytest.raises(RewardError, match="did not answer a probability for each of TOXICITY"):
        classifier.toxicity([RUDE])
    assert classifier.toxicity([RUDE]) == pytest.approx([0.9]), "and it is not kept"


def test_the_rate_holds_over_threads(server: PerspectiveServer) -> None:
    server.delay_s = 0.2
    classifier = load(server, {"requests_per_second": 20})
    shares = [[f"day number {i}" for i in range(start, start + 6)] for start in (0, 6, 12)]
    threads = [threading.Thread(target=classifier.toxicity, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(server.received.values()) == 18
    assert max(server.arrivals) - min(server.arrivals) > 0.8 * 17 / 20


def test_a_slow_answer_does_not_hold_up_the_next_request(server: PerspectiveServer) -> None:
    server.delay_s = 0.2
    load(server, {"requests_per_second": 20}).toxicity([f"day number {i}" for i in range(6)])
    assert server.most_at_once > 1


def test_a_server_that_dies_and_comes_back(server: PerspectiveServer) -> None:
    texts = [f"day number {i}" for i in range(12)]
    server.dies_after = 5
    with pytest.raises(RewardError, match="failed 2 times, at last with RemoteProtocolError"):
        load(server, {"requests_per_second": 100, "retries": 1}).toxicity(texts)
    server.stop()
    with pytest.raises(RewardError, match="ConnectError"):
        load(server, {"retries": 0}).toxicity(texts)
    done = {text for text in texts if server.answered[text]}
    assert 5 <= len(done) < len(texts)
    again = PerspectiveServer(server.port)
    try:
        assert load(again).toxicity(texts) == pytest.approx([0.1] * 12)
        assert set(again.received) == set(texts) - done
        assert max((server.answered + again.answered).values()) == 1
    finally:
        again.stop()


def test_neither_the_key_nor_a_text_is_told(server: PerspectiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []

    def fail(act: Callable[[], Any]) -> None:
        with pytest.raises(RewardError) as error:
            act()
        said.append("".join(traceback.format_exception(error.value)))

    classifier = load(server, {"retries": 0})
    for status, text in ((400, RUDE), (403, RUDE), (429, RUDE), (500, RUDE), (400, "you\n\nrascal, ")):
        server.next_answers = [(status, {}, published_error(status, f"no: key={KEY} may not score {text}"))]
        fail(lambda text=text: classifier.toxicity([text]))
    for quoted in (RUDE.upper(), RUDE[:6], f"{RUDE[:6]}..."):
        body = published_error(400, f"cannot score {quoted}", f"NO {quoted}", reason=f"{quoted}?")
        body["error"]["status"] = quoted
        server.next_answers = [(400, {}, body)]
        fail(lambda: classifier.toxicity([RUDE]))
    classifier.toxicity([RUDE])
    server.stop()
    fail(lambda: classifier.toxicity([CIVIL]))
    assert any("comments:analyze" in record.getMessage() for record in caplog.records)
    for message in [*said, caplog.text]:
        assert KEY not in message
        assert RUDE[:6] not in message.lower()
        assert "rascal" not in message
    assert KEY not in repr(config(server))


def test_what_is_missing_is_said_before_anything_is_asked(
    server: PerspectiveServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PERSPECTIVE_API_KEY")
    (tmp_path / "text").write_text("no database, and long enough to be one: " * 10)
    monkeypatch.setenv("OTHER_KEY", KEY)
    for check in (check_classifier, load_classifier):
        with pytest.raises(ConfigError, match=r"'api': the environment variable PERSPECTIVE_API_KEY holds no key"):
            check(config(server))
        for cache in (tmp_path / "text", tmp_path / "text" / "cache.sqlite"):
            with pytest.raises(ConfigError, match=r"perspective\.cache .*text.* cannot be used"):
                check(config(server, {"cache": str(cache), "api_key_env": None}))
        check(config(server, {"api_key_env": None}))
        check(config(server, {"api_key_env": "OTHER_KEY"}))
    assert not server.received


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "RUDENESS"}, r"label='RUDENESS' is not among the perspective\.attributes TOXICITY, "),
        ({"perspective": {"address": "http://scores.example.org"}}, "carry the key unencrypted: use https"),
        ({"perspective": {"address": "scores.example.org"}}, r"address = 'scores.example.org'"),
        ({"perspective": {"attributes": []}}, "attributes"),
        ({"perspective": {"requests_per_second": 0}}, "requests_per_second = 0"),
        ({"perspective": {"adress": "x"}}, "did you mean 'address'"),
        ({"kind": "linear", "model": "a:b", "perspective": {}}, "kind=linear does not go with perspective"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"reward": {"classifiers": [{"name": "api", "kind": "perspective", **changes}]}})


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    config = parse_config({"reward": {"classifiers": [{"name": "api", "kind": "perspective"}]}})
    [member] = config.reward.classifiers
    assert member.label == "TOXICITY"
    assert member.perspective is not None
    assert member.perspective.address == "https://commentanalyzer.googleapis.com"
    assert member.perspective.requests_per_second == 1
    assert member.perspective.cache == str(tmp_path / "cache" / "perspective.sqlite")
    assert parse_config(yaml.safe_load(dump_config(config))) == config.with_absolute_paths() == config


def test_a_judge_is_another_scorer_if_address_or_label_differ() -> None:
    def parse(judge: dict[str, Any]) -> None:
        api = {"name": "api", "kind": "perspective"}
        parse_config({"reward": {"classifiers": [api]}, "evaluation": {"judge": {**api, "name": "judge", **judge}}})

    for same in ({}, {"perspective": {"address": "https://commentanalyzer.googleapis.com/", "languages": ["en"]}}):
        with pytest.raises(ConfigError, match=r"is also in the reward \(classifier 'api'\)"):
            parse(same)
    parse({"label": "INSULT"})
    parse({"perspective": {"address": "https://scores.example.org"}})


def test_temperature_and_meaning_as_of_other_classifiers(server: PerspectiveServer) -> None:
    plain = load(server, output="logit").score(TEXTS)
    np.testing.assert_allclose(load(server, output="logit", temperature=2.0).score(TEXTS), plain / 2, atol=1e-5)
    turned = load(server, label_means="nontoxic").toxicity([RUDE])
    assert turned == pytest.approx([0.1])
    assert math.isclose(load(server, label_means="nontoxic", output="probability").score([RUDE])[0], 0.9, abs_tol=1e-6)
