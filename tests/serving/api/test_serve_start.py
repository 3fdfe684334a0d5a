"""`detox-ray serve` where the service cannot start: one line, and nothing is left."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from ray import serve

from detox_ray.config import RewardConfig
from detox_ray.errors import ConfigError, RewardError
from detox_ray.serving import http_api, reward_app
from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.http_api import build_http_app
from detox_ray.serving.serve_api import APP_NAME, serve_api, service_placements

from .conftest import linear

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("local_ray")]

WORDS = linear("words", "faulty:rude_words")


def of_service(address: str, **settings: object) -> ApiConfig:
    """With one classifier, on the Serve that runs."""
    reward = RewardConfig(classifiers=[WORDS.model_copy(update=settings)])
    return ApiConfig.model_validate({"reward": reward, "http": {"port": int(address.rpartition(":")[2])}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_gpus": 2},
            r"needs 2 GPUs \(1 x classifier words with 2\) and Ray has 0; .*0\.num_gpus\Z",
        ),
        ({"resources": {"scorer_node": 1}}, "needs 1 of 'scorer_node'"),
        ({"replicas": 50, "num_cpus": 1}, r"needs 50 CPUs .* lower reward\.classifiers\.0\.replicas"),
    ],
)
def test_what_never_fits_is_refused(address: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve_api(of_service(address, **settings), on_ready=print)
    assert APP_NAME not in serve.status().applications


def test_of_a_scaled_classifier_the_fewest_replicas_must_fit() -> None:
    words = WORDS.model_copy(update={"replicas": 50, "num_cpus": 1.0})
    tree = {"reward": RewardConfig(classifiers=[words]), "replicas": {"words": {"min": 2, "max": 50}}}
    [needed] = service_placements(ApiConfig.model_validate(tree))
    assert (needed.count, needed.each) == (2, {"CPU": 1.0})


def test_a_classifier_that_does_not_start_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The root belongs to another app of these tests, and this classifier is refused before it is deployed.
    monkeypatch.setattr("detox_ray.serving.serve_api.ROUTE", "/elsewhere")
    monkeypatch.setattr(reward_app, "check_classifier", lambda _: None)
    monkeypatch.setattr(http_api, "fitted_model", lambda _: SimpleNamespace(model="", revision=""))
    with pytest.raises(RewardError, match=r"classifier 'words': .* cannot be imported") as error:
        serve_api(of_service(address, model="faulty:no_such_function"), on_ready=print)
    assert "\n" not in str(error.value)
    assert APP_NAME not in serve.status().applications


def test_a_service_that_runs_is_neither_replaced_nor_deleted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detox_ray.serving.serve_api.ROUTE", "/elsewhere")
    config = of_service(address)
    serve.run(build_http_app(config), name=APP_NAME, route_prefix="/theirs")
    try:
        with pytest.raises(ConfigError, match="already has the app 'toxicity-api' at /theirs: stop it"):
            serve_api(config, on_ready=print)
        assert httpx.post(f"{address}/theirs/v1/score", json={"text": "a"}, timeout=60).status_code == 200
    finally:
        serve.delete(APP_NAME)


def test_a_route_that_another_app_has_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detox_ray.serving.serve_api.ROUTE", "/theirs")
    config = of_service(address)
    serve.run(build_http_app(config), name="theirs", route_prefix="/theirs")
    try:
        with pytest.raises(ConfigError, match="already has the app 'theirs' at /theirs: stop it"):
            serve_api(config, on_ready=print)
        assert "theirs" in serve.status().applications
    finally:
        serve.delete("theirs")


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    start = time.monotonic()
    command = [Path(sys.executable).with_name("detox-ray"), "serve", "ray.address=127.0.0.1:1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("error: ray.address=127.0.0.1:1 does not answer")
    assert len(found.stderr.strip().splitlines()) == 1
    # Ray itself would wait for minutes; most of this is Python's imports.
    assert time.monotonic() - start < 45
