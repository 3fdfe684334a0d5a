import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.rewards.revision import model_name, model_revision

pytestmark = pytest.mark.unit


def test_a_folder_is_known_by_its_content_and_not_by_its_place(two_labels: Path, tmp_path: Path) -> None:
    here = ClassifierConfig(name="a", kind="transformers", model=str(two_labels))
    copy = tmp_path / "copy"
    shutil.copytree(two_labels, copy)
    weights = (two_labels / "model.safetensors").read_bytes()
    there = ClassifierConfig(name="b", kind="transformers", model=str(copy))
    assert model_revision(here) == model_revision(there)
    assert model_name(there) == "copy"
    (copy / "model.safetensors").write_bytes(weights[:-1] + b"?")
    assert model_revision(here) != model_revision(there)
    (copy / "model.safetensors").write_bytes(weights)
    settings = (copy / "config.json").read_text()
    (copy / "config.json").write_text(settings.replace("LABEL_0", "kind") + " ")
    assert model_revision(here) != model_revision(there)


def test_a_function_is_known_by_its_package() -> None:
    config = ClassifierConfig(name="a", kind="linear", model="profanity_check:predict_prob")
    assert model_name(config) == "profanity_check:predict_prob"
    assert model_revision(config) == f"alt-profanity-check=={version('alt-profanity-check')}"
    assert model_revision(config.model_copy(update={"model": "no_package:f"})) == "unversioned"
