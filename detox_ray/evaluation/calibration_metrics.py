"""Whether probabilities mean what they say: expected calibration error, log loss, bins of a reliability diagram.

Pure NumPy. The unit that is drawn at random for intervals is the text.
"""

from dataclasses import dataclass

import numpy as np

from detox_ray.evaluation.metrics import Interval, Statistic, difference, intervals, mean_of
from detox_ray.evaluation.proportions import Proportion, proportion
from detox_ray.evaluation.rank_metrics import roc_auc
from detox_ray.rewards.probability_calibration import log_loss

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Texts of like probability: their mean probability, and the share of them that is toxic."""

    mean_probability: float
    toxic: Proportion


@dataclass(frozen=True)
class Quality:
    """What probabilities are worth on labelled texts, with 95% intervals."""

    roc_auc: Interval
    calibration_error: Interval
    log_loss: Interval
    bins: list[Bin]


@dataclass(frozen=True)
class QualityChange:
    """The same texts by uncalibrated and by calibrated probabilities; changes are after - before, by the same draws."""

    before: Quality
    after: Quality
    calibration_error_change: Interval
    log_loss_change: Interval


def quality_change(
    before: np.ndarray, after: np.ndarray, toxic: np.ndarray, resamples: int, seed: int
) -> QualityChange:
    """What calibration did to probabilities: `before, after: [N]` in [0, 1], `toxic: [N] bool`."""
    errors = [calibration_error(values, toxic) for values in (before, after)]
    losses = [mean_of(log_loss(values, toxic)) for values in (before, after)]
    statistics = {
        **{"error before": errors[0], "error after": errors[1], "error change": difference(errors[1], errors[0])},
        **{"loss before": losses[0], "loss after": losses[1], "loss change": difference(losses[1], losses[0])},
    }
    found = intervals(statistics, resamples, seed)
    was, became = (
        Quality(
            roc_auc(values, toxic, resamples, seed), found[f"error {when}"], found[f"loss {when}"], bins(values, toxic)
        )
        for values, when in ((before, "before"), (after, "after"))
    )
    return QualityChange(was, became, found["error change"], found["loss change"])


def calibration_error(probability: np.ndarray, toxic: np.ndarray) -> Statistic:
    """Expected calibration error over 15 equal bins ((m - 1) / 15, m / 15] of the probability of toxicity.

    ECE = sum_m |B_m| / N * |share of toxic texts in B_m - mean probability in B_m| (Guo et al. 2017, eq. 3; there the
    bins are of the confidence in the likelier class, here of one class's probability). As |B_m| / N times a mean over
    B_m is a sum over B_m divided by N, ECE is the sum of the absolute values of 15 means over all texts.
    """
    of_bin = _bin(probability)[:, None] == np.arange(BINS)
    return Statistic(of_bin * (toxic - probability)[:, None], lambda means: np.abs(means).sum(axis=1))


def bins(probability: np.ndarray, toxic: np.ndarray) -> list[Bin]:
    """The bins of `calibration_error` that hold a text, from the lowest."""
    of_bin = _bin(probability)
    filled = [of_bin == number for number in np.unique(of_bin)]
    counted = [(float(probability[b].mean()), proportion(int(toxic[b].sum()), int(b.sum()))) for b in filled]
    return [Bin(mean, share) for mean, share in counted if share is not None]


def _bin(probability: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(probability * BINS) - 1, 0, BINS - 1).astype(np.int64)
