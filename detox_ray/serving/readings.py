"""What the classifiers say of a text, as the APIs read it: calibrated, by attribute, by category, as one score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from detox_ray.config import RewardConfig
from detox_ray.errors import ConfigError
from detox_ray.records import Readings, Score
from detox_ray.rewards.classifiers import check_classifier
from detox_ray.rewards.ensemble import aggregate, calibrate, calibrations
from detox_ray.rewards.probability_calibration import ProbabilityMap, calibrated
from detox_ray.serving.api_config import ApiConfig, Category, Source
from detox_ray.serving.calibration_table import CalibrationTable


@dataclass(frozen=True)
class TextReading:
    """What every classifier says of one text, by its name; `toxicity` is calibrated, scores and labels are not."""

    scores: dict[str, float]
    toxicity: dict[str, float]
    labels: dict[str, dict[str, float]]
    windows: dict[str, int]
    releases: frozenset[str]  # of the service: more than one, or another than the asker's, while it is updated


def text_readings(parts: Mapping[str, Sequence[Readings]], table: CalibrationTable) -> list[TextReading]:
    """What the ensemble's `read` returned, one record a text, with the calibrations of the classifiers applied."""
    scores = {name: np.concatenate([part.score for part in found]).tolist() for name, found in parts.items()}
    toxicity = {
        name: calibrated(
            np.concatenate([part.toxicity for part in found]), table.classifiers.get(name, ProbabilityMap())
        ).tolist()
        for name, found in parts.items()
    }
    windows = {name: np.concatenate([part.windows for part in found]).tolist() for name, found in parts.items()}
    labels = {
        name: {label: np.concatenate([part.labels[label] for part in found]).tolist() for label in found[0].labels}
        for name, found in parts.items()
    }
    releases = frozenset(part.release for found in parts.values() for part in found)
    return [
        TextReading(
            scores={name: values[i] for name, values in scores.items()},
            toxicity={name: values[i] for name, values in toxicity.items()},
            labels={name: {label: values[i] for label, values in found.items()} for name, found in labels.items()},
            windows={name: values[i] for name, values in windows.items()},
            releases=releases,
        )
        for i in range(len(next(iter(windows.values()))))
    ]


def ensemble_scores(readings: Sequence[TextReading], config: RewardConfig) -> list[Score]:
    """The ensemble's score of each reading, as training computes it."""
    scale = calibrations(config)
    scores = {name: np.array([reading.scores[name] for reading in readings]) for name in scale}
    return aggregate({name: calibrate(values, scale[name]) for name, values in scores.items()}, config)


def attribute_probability(reading: TextReading, name: str, config: ApiConfig) -> float:
    """The probability of a Perspective attribute that the configuration has."""
    return probability(reading, config.attributes[name], config.calibration.attributes.get(name))


def overall_toxicity(reading: TextReading, config: ApiConfig) -> float:
    """What verdicts and spans go by: the attribute TOXICITY, or without one the mean toxicity over the classifiers."""
    if "TOXICITY" in config.attributes:
        return attribute_probability(reading, "TOXICITY", config)
    return probability(reading, Source())


def category_probability(reading: TextReading, name: Category, config: ApiConfig) -> float:
    """The probability of a category of the moderations API that the configuration has."""
    return probability(reading, config.categories[name], config.calibration.categories.get(name))


def probability(reading: TextReading, source: Source, found: ProbabilityMap | None = None) -> float:
    """The probability that `source` names: of a label, of a classifier's toxicity, or the mean toxicity of all.

    `found` is the calibration of what is made of the source, none where it has none of its own.
    """
    if source.classifier is None:
        value = sum(reading.toxicity.values()) / len(reading.toxicity)
    elif source.label is None:
        value = reading.toxicity[source.classifier]
    else:
        value = reading.labels[source.classifier][source.label]
    return value if found is None else float(calibrated(np.array([value]), found)[0])


def check_labels(config: ApiConfig) -> None:
    """Raises ConfigError when an attribute or a category names a label that its classifier does not have."""
    by_name = {c.name: c for c in config.reward.classifiers}
    for key, source in config.sources.items():
        if source.classifier is None or source.label is None:
            continue
        classifier = by_name[source.classifier]
        if classifier.kind != "transformers":
            raise ConfigError(f"{key}.label={source.label!r}: {classifier.name!r} has one probability and no labels")
        try:
            check_classifier(classifier.model_copy(update={"label": source.label}))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None


def most_windows(readings: Sequence[TextReading]) -> int:
    """The most windows any classifier needed for one of the texts."""
    return max(max(reading.windows.values()) for reading in readings)
