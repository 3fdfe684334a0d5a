"""One Serve with its HTTP proxy, and one service on it, for every test of the HTTP APIs."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from tiny_classifier import save_tiny_classifier

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import RewardConfig
from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.http_api import build_http_app

# Three labels, each with its own sigmoid; "toxic" is the first.
LABELS = ("toxic", "polite", "calm")


def linear(name: str, model: str) -> ClassifierConfig:
    return ClassifierConfig(name=name, kind="linear", model=model, output="probability")


WORDS = linear("words", "profanity_check:predict_prob")


@pytest.fixture(scope="package")
def labels_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("labels"), LABELS, "multi_label_classification", toxic=0)


@pytest.fixture(scope="package")
def api_config(labels_model: Path) -> ApiConfig:
    tiny = ClassifierConfig(
        name="tiny", kind="transformers", model=str(labels_model), calibration="none", max_length=32
    )
    return ApiConfig.model_validate(
        {
            "reward": RewardConfig(classifiers=[WORDS, tiny]),
            "attributes": {
                "TOXICITY": {},
                "INSULT": {"classifier": "tiny", "label": "toxic"},
                "PROFANITY": {"classifier": "words", "languages": ["en", "de"]},
            },
            "categories": {"harassment": {}, "hate": {"classifier": "tiny", "label": "calm", "threshold": 0.9}},
            "limits": {"body_timeout_s": 2, "timeout_s": 20},
            "replicas": {"words": {"min": 1, "max": 2}},
        }
    )


@pytest.fixture(scope="package")
def address(local_ray: Path) -> Iterator[str]:
    """Serve with its HTTP proxy on a free port of the loopback interface, in place of one without."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.shutdown()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="package")
def client(address: str, api_config: ApiConfig) -> Iterator[httpx.Client]:
    serve.run(build_http_app(api_config), name="api", route_prefix="/")
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
    serve.delete("api")


def serve_as(name: str, classifiers: list[ClassifierConfig], **tree: Any) -> None:
    """Serve a configuration under /name, in place of what was there."""
    reward = RewardConfig(classifiers=classifiers, retries=0)
    serve.run(build_http_app(ApiConfig.model_validate({"reward": reward, **tree})), name=name, route_prefix=f"/{name}")


@pytest.fixture
def deploy(address: str) -> Iterator[Callable[..., str]]:
    """Serves a configuration for one test; returns its address."""

    def deploy(classifiers: list[ClassifierConfig], **tree: Any) -> str:
        serve_as("one", classifiers, **tree)
        return f"{address}/one"

    yield deploy
    serve.delete("one")
