"""Scorers that are functions from texts to probabilities: checked, turned round, read as the configuration says."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import RewardError
from detox_ray.records import Readings

# A float32 logit is finite for probabilities inside these bounds, and no farther out than +-13.8.
PROBABILITY_FLOOR = 1e-6


class ProbabilityClassifier:
    """A classifier made of a function that returns, for each text, the probability of what `label_means` says."""

    def __init__(self, config: ClassifierConfig, probability: Callable[[list[str]], Any]) -> None:
        self.name = config.name
        self._config = config
        self._probability = probability

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """See `Classifier.score`."""
        return self._score(self._toxicity(texts))

    def toxicity(self, texts: Sequence[str]) -> np.ndarray:
        """See `Classifier.toxicity`."""
        return self._toxicity(texts).astype(np.float32)

    def read(self, texts: Sequence[str]) -> Readings:
        """See `Classifier.read`; the function is given texts of any length whole."""
        toxicity = self._toxicity(texts)
        windows = np.ones(len(texts), dtype=np.int64)
        return Readings(self._score(toxicity), toxicity.astype(np.float32), labels={}, windows=windows)

    def _score(self, toxicity: np.ndarray) -> np.ndarray:
        """`[N] float32` from probabilities `[N]`."""
        nontoxic = 1.0 - toxicity
        if self._config.output != "probability":
            nontoxic = np.clip(nontoxic, PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)
            nontoxic = np.log(nontoxic) - (np.log1p(-nontoxic) if self._config.output == "logit" else 0.0)
        return nontoxic.astype(np.float32)

    def _toxicity(self, texts: Sequence[str]) -> np.ndarray:
        """`[N] float64`."""
        if not texts:
            return np.zeros(0)
        values = np.asarray(self._probability(list(texts)), dtype=np.float64)
        if values.shape != (len(texts),):
            raise RewardError(
                f"classifier {self.name!r} returned an array of shape {values.shape} for {len(texts)} texts; "
                f"{self._config.model} must return one probability a text"
            )
        finite(self.name, values)
        if values.min() < 0 or values.max() > 1:
            outside = values[(values < 0) | (values > 1)][0]
            raise RewardError(
                f"classifier {self.name!r} returned {outside:.4g}, which is not a probability; "
                f"{self._config.model} must return values in [0, 1]"
            )
        if self._config.temperature != 1.0:
            values = tempered(values, self._config.temperature)
        return values if self._config.label_means == "toxic" else 1.0 - values


def tempered(probability: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities `[N]` whose logits are divided by `temperature` (Guo et al. 2017)."""
    inside = np.clip(probability, PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)
    return 1.0 / (1.0 + ((1.0 - inside) / inside) ** (1.0 / temperature))


def finite(name: str, values: np.ndarray) -> np.ndarray:
    """`values`, if all of them are numbers; raises RewardError in the name of the classifier otherwise."""
    if not np.isfinite(values).all():
        raise RewardError(
            f"classifier {name!r} returned {int((~np.isfinite(values)).sum())} values that are not finite"
        )
    return values
