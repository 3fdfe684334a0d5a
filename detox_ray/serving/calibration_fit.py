"""Fitting the calibrations of a service one after the other: its classifiers, then what is read from them.

A key names what has a probability: `classifiers.NAME`, `attributes.NAME` or `categories.NAME`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import numpy as np

from detox_ray.errors import ConfigError
from detox_ray.records import Readings
from detox_ray.rewards.probability_calibration import FittedMap, Method, fit_map
from detox_ray.serving.api_config import ApiConfig, Category
from detox_ray.serving.calibration_table import SourceMap, fitted_model
from detox_ray.serving.readings import attribute_probability, category_probability, text_readings

CLASSIFIERS = "classifiers"


def key_of(name: str, config: ApiConfig) -> str:
    """`TOXICITY` -> `attributes.TOXICITY`.

    Raises:
        ConfigError: the service has neither an attribute nor a category nor a classifier of this name.
    """
    names: dict[str, list[str]] = {
        "attributes": list(config.attributes),
        "categories": list(config.categories),
        CLASSIFIERS: [c.name for c in config.reward.classifiers],
    }
    for kind, known in names.items():
        if name in known:
            return f"{kind}.{name}"
    listed = "; ".join(f"{kind}: {', '.join(known)}" for kind, known in names.items())
    raise ConfigError(f"{name!r} is no attribute, category or classifier of the service, which has {listed}")


def classifiers_read(key: str, config: ApiConfig) -> list[str]:
    """The names of the classifiers that `key` is made of."""
    kind, _, name = key.partition(".")
    return [name] if kind == CLASSIFIERS else config.classifiers_of(config.sources[key])


def with_classifiers(labels: Mapping[str, str], config: ApiConfig) -> dict[str, str]:
    """Key -> column of its labels, classifiers first: those of `labels`, and those whose toxicity one of them reads.

    The latter have the column of the first that reads them.
    """
    found = {key: column for key, column in labels.items() if key.startswith(CLASSIFIERS)}
    for key, column in labels.items():
        source = config.sources.get(key)
        if source is not None and source.label is None:
            for name in classifiers_read(key, config):
                found.setdefault(f"{CLASSIFIERS}.{name}", column)
    return found | dict(labels)


def probabilities(key: str, config: ApiConfig, parts: Mapping[str, Sequence[Readings]]) -> np.ndarray:
    """`[N] float64`: what the service answers, from what its classifiers say of N texts."""
    kind, _, name = key.partition(".")
    readings = text_readings(parts, config.calibration)
    match kind:
        case "attributes":
            values = [attribute_probability(reading, name, config) for reading in readings]
        case "categories":
            values = [category_probability(reading, cast(Category, name), config) for reading in readings]
        case _:
            values = [reading.toxicity[name] for reading in readings]
    return np.array(values, dtype=np.float64)


def with_fit(
    key: str,
    config: ApiConfig,
    parts: Mapping[str, Sequence[Readings]],
    toxic: np.ndarray,
    rows: np.ndarray,
    method: Method | Literal["auto"],
    seed: int,
) -> ApiConfig:
    """`config` with the calibration of `key`, fitted on the texts `rows: [N] bool` by their labels `toxic: [N] bool`.

    The key has none yet, and its classifiers have theirs already.
    """
    kind, _, name = key.partition(".")
    found = fit_map(probabilities(key, config, parts)[rows], toxic[rows], method, seed)
    fitted = found.model_dump() | {"texts": int(rows.sum()), "toxic": int(toxic[rows].sum())}
    read = classifiers_read(key, config)
    if kind != CLASSIFIERS:
        fitted |= {"classifiers": read, "label": config.sources[key].label}
    models = {c.name: fitted_model(c) for c in config.reward.classifiers if c.name in read}
    table = config.calibration
    entry = FittedMap(**fitted) if kind == CLASSIFIERS else SourceMap(**fitted)
    update = {"models": table.models | models, kind: getattr(table, kind) | {name: entry}}
    return config.model_copy(update={"calibration": table.model_copy(update=update)})
