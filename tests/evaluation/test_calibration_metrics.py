import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from detox_ray.evaluation.calibration_metrics import BINS, bins, calibration_error, quality_change
from detox_ray.evaluation.metrics import Statistic

pytestmark = pytest.mark.unit


def value(statistic: Statistic) -> float:
    return float(statistic.value(statistic.columns.mean(axis=0, keepdims=True))[0])


def test_the_error_by_hand() -> None:
    # Bins 1, 8 and 15: |1/2 - 0.05| of two texts, |1 - 0.5| of one, |2/3 - 0.95| of three.
    probability = np.array([0.04, 0.06, 0.5, 0.94, 0.95, 0.96])
    toxic = np.array([True, False, True, True, True, False])
    expected = 2 / 6 * 0.45 + 1 / 6 * 0.5 + 3 / 6 * (0.95 - 2 / 3)
    assert value(calibration_error(probability, toxic)) == pytest.approx(expected)


def test_the_error_equals_a_direct_loop() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(500).round(2)
    toxic = rng.random(500) < probability**2
    error = 0.0
    for m in range(1, BINS + 1):
        inside = [i for i, p in enumerate(probability) if (m - 1) / BINS < p <= m / BINS or (m == 1 and p == 0)]
        if inside:
            share, mean = toxic[inside].mean(), probability[inside].mean()
            error += len(inside) / 500 * abs(share - mean)
    assert value(calibration_error(probability, toxic)) == pytest.approx(error)


def test_bins_are_those_of_the_error() -> None:
    rng = np.random.default_rng(1)
    probability = np.concatenate([[0.0, 1.0, 1 / 15, 14 / 15], rng.random(200) ** 3])
    toxic = rng.random(204) < probability
    found = bins(probability, toxic)
    assert sum(b.toxic.total for b in found) == 204
    error = sum(b.toxic.total / 204 * abs(b.toxic.value - b.mean_probability) for b in found)
    assert value(calibration_error(probability, toxic)) == pytest.approx(error)
    assert all(b.toxic.low <= b.toxic.value <= b.toxic.high for b in found)


def test_the_change_is_of_the_same_draws() -> None:
    rng = np.random.default_rng(2)
    right = rng.random(2000)
    toxic = rng.random(2000) < right
    wrong = right**3
    found = quality_change(wrong, right, toxic, 500, 0)
    assert found.before.log_loss.value == pytest.approx(log_loss(toxic, wrong))
    assert found.after.roc_auc.value == found.before.roc_auc.value == pytest.approx(roc_auc_score(toxic, right))
    change = found.log_loss_change
    assert change.value == pytest.approx(found.after.log_loss.value - found.before.log_loss.value)
    assert change.low < change.value < change.high < 0
    assert found.calibration_error_change.high < 0
    # Paired: narrower than two intervals that know nothing of each other.
    apart = (
        found.after.log_loss.high - found.before.log_loss.low - found.after.log_loss.low + found.before.log_loss.high
    )
    assert change.high - change.low < apart
    nothing = quality_change(right, right, toxic, 500, 0)
    assert nothing.log_loss_change == (0, 0, 0)
