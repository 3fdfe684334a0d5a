from collections.abc import Iterator
from pathlib import Path

import pytest
from perspective_server import KEY, PerspectiveServer
from tiny_classifier import save_tiny_classifier

from detox_ray.rewards import perspective_client


@pytest.fixture(scope="session")
def two_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("two-labels"))


@pytest.fixture(scope="session")
def many_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = ("toxic", "polite", "calm")
    return save_tiny_classifier(tmp_path_factory.mktemp("many-labels"), labels, "multi_label_classification", toxic=0)


@pytest.fixture(scope="session")
def one_label(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("one-label"), ("toxic",))


@pytest.fixture
def server() -> Iterator[PerspectiveServer]:
    server = PerspectiveServer()
    yield server
    server.stop()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    monkeypatch.setenv("DETOX_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(perspective_client, "BACKOFF_S", 0.02)
