"""Probabilities as the APIs read them, with and without a calibration."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import ConfigError
from detox_ray.records import Readings
from detox_ray.serving.api_config import ApiConfig, Source, load_api_config
from detox_ray.serving.calibration_table import CalibrationTable, check_models, fitted_model
from detox_ray.serving.readings import (
    attribute_probability,
    category_probability,
    check_labels,
    ensemble_scores,
    probability,
    text_readings,
)

pytestmark = pytest.mark.unit

WORDS = ClassifierConfig(
    name="words", kind="linear", model="profanity_check:predict_prob", output="probability", calibration="none"
)
OTHER = WORDS.model_copy(update={"name": "other", "temperature": 2.0})
SHARPEN = {"method": "temperature", "temperature": 0.5, "texts": 100, "toxic": 40}
HALVE = {"method": "isotonic", "knots": [[0, 0], [1, 0.5]], "texts": 100, "toxic": 40}
MODELS = {c.name: fitted_model(c).model_dump() for c in (WORDS, OTHER)}
PARTS = {
    "words": [
        Readings(np.array([-1.0, -2.0]), np.array([0.75, 0.5]), {"insult": np.array([0.2, 0.8])}, np.ones(2, int)),
    ],
    "other": [
        Readings(np.array([-3.0]), np.array([0.25]), {}, np.ones(1, int)),
        Readings(np.array([-4.0]), np.array([1.0]), {}, np.ones(1, int)),
    ],
}


def config(**calibration: dict) -> ApiConfig:
    return ApiConfig.model_validate(
        {
            "reward": {"classifiers": [WORDS.model_dump(), OTHER.model_dump()]},
            "attributes": {"TOXICITY": {}, "INSULT": {"classifier": "words", "label": "insult"}},
            "categories": {"harassment": {}, "hate": {"classifier": "other"}},
            "calibration": {"models": MODELS, **calibration} if calibration else {},
        }
    )


def test_without_a_calibration_nothing_changes() -> None:
    first, second = text_readings(PARTS, config().calibration)
    assert first.toxicity == {"words": 0.75, "other": 0.25}
    assert attribute_probability(second, "TOXICITY", config()) == 0.75
    assert attribute_probability(second, "INSULT", config()) == 0.8
    assert category_probability(second, "hate", config()) == 1


def test_a_classifiers_calibration_reaches_all_that_reads_its_toxicity_but_not_the_reward() -> None:
    ours = config(classifiers={"words": SHARPEN})
    first, second = text_readings(PARTS, ours.calibration)
    # Odds 3 : 1 squared.
    assert first.toxicity == {"words": pytest.approx(0.9), "other": 0.25}
    assert probability(first, Source()) == pytest.approx((0.9 + 0.25) / 2)
    assert attribute_probability(first, "TOXICITY", ours) == category_probability(first, "harassment", ours)
    assert attribute_probability(first, "TOXICITY", ours) == pytest.approx((0.9 + 0.25) / 2)
    # A label is no toxicity.
    assert attribute_probability(second, "INSULT", ours) == 0.8
    raw = text_readings(PARTS, CalibrationTable())
    assert ensemble_scores([first, second], ours.reward) == ensemble_scores(raw, ours.reward)


def test_an_attribute_is_calibrated_after_its_classifiers() -> None:
    mean = {**HALVE, "classifiers": ["words", "other"]}
    insult = {**HALVE, "classifiers": ["words"], "label": "insult"}
    ours = config(
        classifiers={"words": SHARPEN},
        attributes={"TOXICITY": mean, "INSULT": insult},
        categories={"hate": {**HALVE, "classifiers": ["other"]}},
    )
    first, second = text_readings(PARTS, ours.calibration)
    assert attribute_probability(first, "TOXICITY", ours) == pytest.approx((0.9 + 0.25) / 4)
    assert attribute_probability(second, "INSULT", ours) == pytest.approx(0.4)
    assert category_probability(second, "hate", ours) == pytest.approx(0.5)
    # What has no calibration of its own is as its classifiers are.
    assert category_probability(first, "harassment", ours) == pytest.approx((0.9 + 0.25) / 2)


def test_a_file_names_the_table(tmp_path: Path) -> None:
    table = {"models": MODELS, "classifiers": {"words": SHARPEN}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    tree = config().model_dump(exclude={"calibration"}) | {"calibration": str(tmp_path / "table.yaml")}
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(tree))
    assert load_api_config(tmp_path / "service.yaml") == config(classifiers={"words": SHARPEN})
    (tmp_path / "table.yaml").unlink()
    assert load_api_config(tmp_path / "service.yaml", calibrated=False) == config()
    with pytest.raises(ConfigError, match=r"calibration=.*table.yaml cannot be read .*detox-ray calibrate"):
        load_api_config(tmp_path / "service.yaml")


def test_the_table_that_comes_with_the_configuration_fits_it() -> None:
    path = Path(__file__).parents[2] / "configs" / "alt-profanity-check.calibration.yaml"
    found = load_api_config(None, [f"calibration={path}"])
    [judge] = [c for c in found.reward.classifiers if c.name == "alt-profanity-check"]
    check_models(found.calibration, {judge.name: fitted_model(judge)})
    assert list(found.calibration.classifiers) == [judge.name]
    assert not load_api_config(None).calibration.classifiers


def test_the_classifiers_of_a_run_may_be_calibrated(tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"models": {"words": MODELS["words"]}}))
    run = {
        "policy": {"model": "some/model"},
        "reward": {"classifiers": [{"name": "words", "kind": "linear", "model": "a:b"}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    found = load_api_config(tmp_path / "run.yaml", [f"calibration={tmp_path / 'table.yaml'}"])
    assert list(found.calibration.models) == ["words"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "holds no calibrations"),
        ("a: [", "cannot be read"),
        ("classifier: {}", "unknown key 'classifier'; did you mean 'classifiers'"),
        ("classifiers: {words: {method: none, texts: 9, toxic: 1}}", "models.words is missing"),
        ("classifiers: {words: {texts: 9, toxic: 1}}", "classifiers.words.method is missing"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "table.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_api_config(None, [f"calibration={path}"])
    assert "\n" not in str(error.value)
    assert "give the calibration.yaml that detox-ray calibrate wrote" in str(error.value)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"models": {"gone": MODELS["words"]}}, "calibration.models.gone is no classifier of the service"),
        ({"attributes": {"THREAT": {**HALVE, "classifiers": ["words"]}}}, "the service has no attributes.THREAT"),
        (
            {"attributes": {"TOXICITY": {**HALVE, "classifiers": ["words"]}}},
            "calibration.attributes.TOXICITY was fitted for words, which attributes.TOXICITY no longer reads",
        ),
        (
            {"attributes": {"INSULT": {**HALVE, "classifiers": ["words"], "label": "rude"}}},
            "for words, label rude, which attributes.INSULT no longer reads",
        ),
    ],
)
def test_a_table_of_another_service_is_refused(calibration: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**calibration)


@pytest.mark.parametrize(
    ("key", "value"),
    [("revision", "alt-profanity-check==0.1"), ("model", "another:function"), ("label", "rude"), ("temperature", 3.0)],
)
def test_a_table_of_another_model_is_refused(key: str, value: str | float) -> None:
    table = CalibrationTable.model_validate({"models": {"words": MODELS["words"] | {key: value}}})
    with pytest.raises(ConfigError, match=f"words was fitted with {key}={value}, but the service has"):
        check_models(table, {"words": fitted_model(WORDS)})
    check_models(table, {"words": fitted_model(WORDS).model_copy(update={key: value})})


def test_a_label_that_a_classifier_does_not_have() -> None:
    with pytest.raises(ConfigError, match=r"attributes.INSULT.label='insult': 'words' has one probability"):
        check_labels(config())
