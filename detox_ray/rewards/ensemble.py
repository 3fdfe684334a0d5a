"""From the scores of several classifiers to one reward; pure functions of arrays."""

from collections.abc import Mapping

import numpy as np

from detox_ray.classifier_config import Calibration
from detox_ray.config import RewardConfig
from detox_ray.errors import RewardError
from detox_ray.records import Score

# Below this spread a classifier says the same of every text and cannot guide a policy.
MIN_STD = 1e-6
# Standard deviations at which a calibrated score is cut, as reward models' scores commonly are: a classifier that said
# nearly the same of all it was calibrated on would give the first toxic text a reward of -10,000.
LARGEST_SCORE = 10.0
UNCALIBRATED = Calibration(mean=0.0, std=1.0)


def fit_calibration(name: str, scores: np.ndarray) -> Calibration:
    """Mean and population standard deviation of a classifier's scores `[N]`, N >= 2.

    Raises:
        RewardError: there are fewer than two scores, one is not finite, or they are all the same.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.size < 2 or not np.isfinite(scores).all():
        raise RewardError(f"classifier {name!r}: calibration needs two or more finite scores, got {scores.size}")
    std = float(scores.std())
    if std <= MIN_STD:
        raise RewardError(
            f"classifier {name!r} gives every text the same score ({scores[0]:.4g}) and cannot guide a policy; "
            "check its model, label and max_length, or leave it out"
        )
    return Calibration(mean=float(scores.mean()), std=std)


def calibrate(scores: np.ndarray, calibration: Calibration) -> np.ndarray:
    """(score - mean) / std of `scores: [N]`, cut at +-10, as `[N] float32`; `UNCALIBRATED` leaves them as they are."""
    scores = np.asarray(scores, dtype=np.float64)
    if calibration != UNCALIBRATED:
        scores = np.clip((scores - calibration.mean) / calibration.std, -LARGEST_SCORE, LARGEST_SCORE)
    return scores.astype(np.float32)


def calibrations(config: RewardConfig) -> dict[str, Calibration]:
    """The calibration of each member by name; that of a member with `none` changes nothing.

    Raises:
        RewardError: a member's calibration is still `fit`, so there are no numbers yet.
    """
    found: dict[str, Calibration] = {}
    for classifier in config.classifiers:
        if classifier.calibration == "fit":
            raise RewardError(
                f"classifier {classifier.name!r} is not calibrated yet (calibration: fit); "
                "fit it first, or set calibration to none or to numbers"
            )
        found[classifier.name] = UNCALIBRATED if classifier.calibration == "none" else classifier.calibration
    return found


def with_calibrations(config: RewardConfig, fitted: Mapping[str, Calibration]) -> RewardConfig:
    """`config` with the calibration of the named members replaced."""
    classifiers = [
        c.model_copy(update={"calibration": fitted[c.name]}) if c.name in fitted else c for c in config.classifiers
    ]
    return config.model_copy(update={"classifiers": classifiers})


def aggregate(members: Mapping[str, np.ndarray], config: RewardConfig) -> list[Score]:
    """One Score a text from the calibrated scores `{name: [N]}` of all members of `config`.

    `disagreement` is the population standard deviation over the members.

    Raises:
        RewardError: a member is missing, has another length than the first, or a score is not finite.
    """
    names = [c.name for c in config.classifiers]
    if set(members) != set(names):
        raise RewardError(f"scores of {sorted(members)} do not fit the ensemble {sorted(names)}")
    sizes = {name: len(members[name]) for name in names}
    if len(set(sizes.values())) > 1:
        raise RewardError(f"classifiers scored different numbers of texts: {sizes}")
    scores = np.stack([np.asarray(members[name], dtype=np.float64) for name in names])
    for name, row in zip(names, scores, strict=True):
        if not np.isfinite(row).all():
            raise RewardError(f"classifier {name!r} returned a score that is not finite")
    std = scores.std(axis=0)
    if config.aggregation == "mean":
        rewards = scores.mean(axis=0)
    elif config.aggregation == "min":
        rewards = scores.min(axis=0)
    elif config.aggregation == "weighted":
        rewards = np.average(scores, axis=0, weights=[c.weight for c in config.classifiers])
    else:
        rewards = scores.mean(axis=0) - config.std_coefficient * std
    return [
        Score(
            reward=float(rewards[i]),
            per_classifier={name: float(scores[k, i]) for k, name in enumerate(names)},
            disagreement=float(std[i]),
        )
        for i in range(scores.shape[1])
    ]
