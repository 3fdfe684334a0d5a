from pathlib import Path

import pytest
from tiny_classifier import save_tiny_classifier


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
