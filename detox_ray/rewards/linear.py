"""`kind: linear`: a function of texts that returns probabilities, or the lab's hashed linear model; on the CPU."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import ConfigError, ModelError, first_line
from detox_ray.rewards.import_path import imported
from detox_ray.rewards.probability import ProbabilityClassifier

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
LINEAR_SETTINGS = {"n_features", "ngram_range", "lowercase", "alternate_sign", "norm", "analyzer"}


class LinearClassifier(ProbabilityClassifier):
    """A function of texts that returns probabilities, or the lab's hashed linear model; on the CPU."""

    def __init__(self, config: ClassifierConfig) -> None:
        folder = Path(config.model).is_dir()
        super().__init__(config, _load_linear(config) if folder else _import_probability(config))


def check_linear(config: ClassifierConfig) -> None:
    """Raises what `LinearClassifier` would raise, as far as that can be known without loading weights."""
    if Path(config.model).is_dir():
        _linear_settings(config)
    else:
        _import_probability(config)


def _import_probability(config: ClassifierConfig) -> Callable[[list[str]], Any]:
    """The function at `package.module:function`; of an object with `predict_proba`, its second column."""
    where = f"classifier {config.name!r}: {config.model!r}"
    if not IMPORT_PATH.fullmatch(config.model):
        raise ModelError(f"{where} is neither a folder nor an import path; write package.module:function")
    target = imported(config.model, f"classifier {config.name!r}")
    if hasattr(target, "predict_proba"):
        return lambda texts: np.asarray(target.predict_proba(texts))[:, 1]
    if not callable(target):
        raise ConfigError(
            f"{where} is not callable; name a function of a list of texts, or an object with predict_proba"
        )
    return target


def _linear_settings(config: ClassifierConfig) -> dict[str, Any]:
    """The vectorizer settings in `linear.json`, checked."""
    path = Path(config.model) / "linear.json"
    where = f"classifier {config.name!r}: {path}"
    if not path.with_suffix(".safetensors").is_file():
        raise ModelError(f"{where.removesuffix('.json')}.safetensors does not exist; make the model again")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{where} cannot be read: {first_line(error)}; make the model again") from None
    if unknown := set(settings) - LINEAR_SETTINGS:
        raise ModelError(f"{where} has unknown settings {sorted(unknown)}; known: {', '.join(sorted(LINEAR_SETTINGS))}")
    settings["ngram_range"] = tuple(settings.get("ngram_range", (1, 1)))
    return settings


def _load_linear(config: ClassifierConfig) -> Callable[[list[str]], np.ndarray]:
    """P(toxic) = sigmoid(x . coef + intercept), x the hashed n-grams of a text."""
    from safetensors.numpy import load_file
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(**_linear_settings(config))
    weights = load_file(Path(config.model) / "linear.safetensors")
    expected = {"coef": (vectorizer.n_features,), "intercept": (1,)}
    if (shapes := {name: array.shape for name, array in weights.items()}) != expected:
        raise ModelError(f"classifier {config.name!r}: {config.model} holds {shapes}, expected {expected}")
    coef, intercept = weights["coef"].astype(np.float64), float(weights["intercept"][0])

    def probability(texts: list[str]) -> np.ndarray:
        return np.exp(-np.logaddexp(0.0, -(vectorizer.transform(texts) @ coef + intercept)))

    return probability
