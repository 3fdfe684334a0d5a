"""From probabilities to calibrated ones: temperature scaling and isotonic regression; pure functions of arrays.

SciPy and scikit-learn, which only fitting needs, are imported there: every command reads the configuration of a map.
"""

from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from detox_ray.config_section import Section
from detox_ray.rewards.probability import PROBABILITY_FLOOR, tempered

Method = Literal["none", "temperature", "isotonic"]
# From the simplest: a later one is taken only if it is reliably better.
METHODS: tuple[Method, ...] = ("none", "temperature", "isotonic")
TEMPERATURES = (0.05, 20.0)
FOLDS = 5
# The knots that are kept describe the fitted line to within this.
KNOT_TOLERANCE = 0.005


class ProbabilityMap(Section):
    """How a probability becomes a calibrated one; never falling, so that no order is turned round."""

    method: Method = Field("none", description="which of the numbers below are used")
    temperature: float = Field(1.0, gt=0, description="temperature: the logit is divided by it (Guo et al. 2017)")
    knots: list[tuple[float, float]] = Field(
        [], description="isotonic: (raw, calibrated), straight lines between them and level beyond the ends"
    )

    @model_validator(mode="after")
    def _fits_its_method(self) -> "ProbabilityMap":
        if (self.method == "isotonic") != bool(self.knots) or (self.method != "temperature" and self.temperature != 1):
            raise ValueError(f"method={self.method} does not go with its numbers: isotonic has knots, temperature one")
        if any(not 0 <= value <= 1 for knot in self.knots for value in knot):
            raise ValueError("a knot is not a pair of probabilities in [0, 1]")
        if any(left[0] >= right[0] or left[1] > right[1] for left, right in pairwise(self.knots)):
            raise ValueError("knots do not rise from one to the next")
        return self


class FittedMap(ProbabilityMap):
    """A calibration, and how many labelled texts it was fitted on."""

    method: Method = Field(description="the one that was fitted")
    texts: int = Field(ge=1, description="labelled texts it was fitted on")
    toxic: int = Field(ge=1, description="toxic ones among them")


def calibrated(probability: np.ndarray, found: ProbabilityMap) -> np.ndarray:
    """The calibrated probabilities `[N] float64` of `probability: [N]` in [0, 1]."""
    probability = np.asarray(probability, dtype=np.float64)
    match found.method:
        case "temperature":
            return tempered(probability, found.temperature)
        case "isotonic":
            raw, value = np.array(found.knots).T
            return np.interp(probability, raw, value)
    return probability


def fit_map(
    probability: np.ndarray, toxic: np.ndarray, method: Method | Literal["auto"] = "auto", seed: int = 0
) -> ProbabilityMap:
    """The map of `probability: [N]` to how often `toxic: [N] bool` is true.

    `auto` takes the simplest method that none of the others beats by more than one standard error of the difference,
    in log loss under stratified cross-validation (Hastie et al. 2009, sec. 7.10).
    """
    if method == "auto":
        method = _best_method(probability, toxic, seed)
    match method:
        case "temperature":
            return fit_temperature(probability, toxic)
        case "isotonic":
            return fit_isotonic(probability, toxic)
    return ProbabilityMap()


def fit_temperature(probability: np.ndarray, toxic: np.ndarray) -> ProbabilityMap:
    """The temperature with the lowest log loss (Guo et al. 2017, sec. 4.2), in `TEMPERATURES`; shapes as `fit_map`."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_temperature: log_loss(tempered(probability, np.exp(log_temperature)), toxic).mean(),
        bounds=np.log(TEMPERATURES),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return ProbabilityMap(method="temperature", temperature=round(float(np.exp(found.x)), 4))


def fit_isotonic(probability: np.ndarray, toxic: np.ndarray) -> ProbabilityMap:
    """Isotonic regression (Zadrozny and Elkan 2002) with straight lines between the middles of its steps.

    The lines keep the order of texts that a step would make equal; beyond the outermost middles the map is level. It
    stays as far from 0 and 1 as so many texts can show (Platt 1999). Shapes as `fit_map`; both classes must be there.
    """
    from sklearn.isotonic import IsotonicRegression

    # As exact as the table that is written: what is one place there is one here.
    probability = np.asarray(probability, dtype=np.float64).round(6)
    positives = int(np.sum(toxic))
    low, high = 1 / (len(toxic) - positives + 2), (positives + 1) / (positives + 2)
    steps = IsotonicRegression(y_min=low, y_max=high).fit_transform(probability, toxic)
    value, step, texts = np.unique(steps.round(9), return_inverse=True, return_counts=True)
    middle = np.bincount(step, weights=probability) / texts
    return ProbabilityMap(method="isotonic", knots=_needed(middle.round(6), value.round(6)))


def log_loss(probability: np.ndarray, toxic: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each label in nats, `[N]`; shapes as `fit_map`."""
    inside = np.clip(probability, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return -np.log(np.where(toxic, inside, 1 - inside))


def _best_method(probability: np.ndarray, toxic: np.ndarray, seed: int) -> Method:
    best: Method = METHODS[0]
    losses = {method: _heldout_loss(probability, toxic, method, seed) for method in METHODS}
    for method in METHODS[1:]:
        gain = losses[best] - losses[method]
        if gain.mean() > gain.std() / np.sqrt(len(gain)):
            best = method
    return best


def _heldout_loss(probability: np.ndarray, toxic: np.ndarray, method: Method, seed: int) -> np.ndarray:
    """The log loss `[N]` of each text under the map fitted without its fold."""
    from sklearn.model_selection import StratifiedKFold

    losses = np.empty(len(toxic))
    for inside, outside in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(probability, toxic):
        found = fit_map(probability[inside], toxic[inside], method)
        losses[outside] = log_loss(calibrated(probability[outside], found), toxic[outside])
    return losses


def _needed(raw: np.ndarray, value: np.ndarray) -> list[tuple[float, float]]:
    """Those of the rising points that describe all: the farthest from the line is added until none is far."""
    kept = sorted({0, len(raw) - 1})
    while True:
        error = np.abs(np.interp(raw, raw[kept], value[kept]) - value)
        if error.max() <= KNOT_TOLERANCE:
            return list(zip(raw[kept].tolist(), value[kept].tolist(), strict=True))
        kept = sorted([*kept, int(error.argmax())])
