"""The calibrations of a service, as `detox-ray calibrate` writes them, and what they were fitted for."""

from pathlib import Path

import yaml
from pydantic import Field, model_validator

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config_file import parse_section
from detox_ray.config_section import Section
from detox_ray.errors import ConfigError
from detox_ray.rewards.probability_calibration import FittedMap
from detox_ray.rewards.revision import model_name, model_revision


class FittedModel(Section):
    """What decides which probability a classifier gives."""

    model: str = Field(description="folder, hub id or import path")
    revision: str = Field(description="commit, version or digest")
    label: str | int = Field(description="the label that is read")
    label_means: str = Field(description="toxic or nontoxic")
    temperature: float = Field(description="what its logits are divided by")


class SourceMap(FittedMap):
    """The calibration of an attribute or a category, of what its classifiers, calibrated themselves, make of a text."""

    classifiers: list[str] = Field(min_length=1, description="the one it reads, or all whose mean it is")
    label: str | None = Field(None, description="the label it reads")


class CalibrationTable(Section):
    """Everything that is calibrated, by name."""

    models: dict[str, FittedModel] = Field({}, description="the classifiers it was fitted for")
    classifiers: dict[str, FittedMap] = Field({}, description="the calibrations of their toxicity")
    attributes: dict[str, SourceMap] = Field({}, description="of Perspective")
    categories: dict[str, SourceMap] = Field({}, description="of the moderations API")

    @property
    def sources(self) -> dict[str, SourceMap]:
        """The calibrations of attributes and categories, by the key of each."""
        found = {f"attributes.{name}": source for name, source in self.attributes.items()}
        return found | {f"categories.{name}": source for name, source in self.categories.items()}

    @model_validator(mode="after")
    def _models_are_named(self) -> "CalibrationTable":
        read = {*self.classifiers, *(name for source in self.sources.values() for name in source.classifiers)}
        if unnamed := read - set(self.models):
            raise ValueError(f"models.{min(unnamed)} is missing: say which model it was fitted for")
        return self


def read_table(path: str | Path) -> CalibrationTable:
    """The table in a YAML file that `detox-ray calibrate` wrote.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    fix = "give the calibration.yaml that detox-ray calibrate wrote"
    try:
        tree = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"calibration={path} cannot be read ({type(error).__name__}); {fix}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"calibration={path} holds no calibrations; {fix}")
    try:
        return parse_section(CalibrationTable, tree)
    except ConfigError as error:
        raise ConfigError(f"calibration={path}: {error}; {fix}") from None


def fitted_model(classifier: ClassifierConfig) -> FittedModel:
    """What a classifier is that a calibration is fitted for now."""
    return FittedModel(
        model=model_name(classifier),
        revision=model_revision(classifier),
        label=classifier.label,
        label_means=classifier.label_means,
        temperature=classifier.temperature,
    )


def check_models(table: CalibrationTable, models: dict[str, FittedModel]) -> None:
    """Raises ConfigError when the table was fitted for another model than the service has; `models` by classifier."""
    for name, fitted_for in table.models.items():
        theirs, ours = fitted_for.model_dump(), models[name].model_dump()
        for key, value in theirs.items():
            if value != ours[key]:
                raise ConfigError(
                    f"calibration: {name} was fitted with {key}={value}, but the service has {ours[key]}: "
                    "run detox-ray calibrate again, or leave calibration out"
                )
