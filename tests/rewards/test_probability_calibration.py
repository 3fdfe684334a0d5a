import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss

from detox_ray.config_file import parse_section
from detox_ray.errors import ConfigError
from detox_ray.rewards.probability_calibration import (
    KNOT_TOLERANCE,
    ProbabilityMap,
    calibrated,
    fit_isotonic,
    fit_map,
    fit_temperature,
    log_loss,
)

pytestmark = pytest.mark.unit


def texts(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right, and labels drawn by them."""
    rng = np.random.default_rng(seed)
    right = expit(rng.normal(-1, 2, number))
    return right, rng.random(number) < right


def test_a_logit_that_is_too_large_is_recovered() -> None:
    right, toxic = texts(200_000)
    overconfident = expit(3 * logit(right))
    found = fit_temperature(overconfident, toxic)
    assert found.temperature == pytest.approx(3, rel=0.02)
    assert calibrated(overconfident, found) == pytest.approx(right, abs=0.01)


def test_the_temperature_is_the_slope_of_a_logistic_regression_without_intercept() -> None:
    right, toxic = texts(3000)
    raw = expit(0.4 * logit(right) + 0.3)
    regression = LogisticRegression(fit_intercept=False, C=np.inf).fit(logit(raw)[:, None], toxic)
    assert 1 / fit_temperature(raw, toxic).temperature == pytest.approx(regression.coef_[0, 0], rel=1e-3)


def test_a_temperature_of_two_by_hand() -> None:
    # The odds 9 : 1 become their square root, 3 : 1.
    found = ProbabilityMap(method="temperature", temperature=2)
    assert calibrated(np.array([0.9, 0.5, 0.1]), found) == pytest.approx([0.75, 0.5, 0.25])
    ends = calibrated(np.array([0.0, 1.0]), found)
    assert 0 < ends[0] < 0.01 < 0.99 < ends[1] < 1


def test_isotonic_recovers_a_shift_that_no_temperature_can() -> None:
    right, toxic = texts(20_000)
    shifted = expit(logit(right) - 2)
    by_lines = calibrated(shifted, fit_isotonic(shifted, toxic))
    by_temperature = calibrated(shifted, fit_temperature(shifted, toxic))
    assert np.abs(by_lines - right).mean() < 0.015
    assert np.abs(by_temperature - right).mean() > 0.1


def test_isotonic_passes_through_the_middles_of_sklearns_steps() -> None:
    right, toxic = texts(500)
    found = fit_isotonic(right, toxic)
    steps = IsotonicRegression().fit_transform(right, toxic)
    inner = [value for value in np.unique(steps) if 0.05 < value < 0.95]
    assert len(inner) > 3
    for value in inner:
        middle = right[steps == value].mean()
        assert calibrated(np.array([middle]), found)[0] == pytest.approx(value, abs=KNOT_TOLERANCE + 1e-5)
    assert len(found.knots) <= len(np.unique(steps)) + 2


def test_isotonic_keeps_the_order_and_is_never_certain() -> None:
    raw = np.array([0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    toxic = np.array([0, 0, 0, 1, 0, 1, 1, 1], dtype=bool)
    found = fit_isotonic(raw, toxic)
    grid = calibrated(np.linspace(0, 1, 101), found)
    assert (np.diff(grid) >= 0).all()
    # Platt's targets for four texts of each class.
    assert grid[0] == pytest.approx(1 / 6, abs=1e-4)
    assert grid[-1] == pytest.approx(5 / 6, abs=1e-4)


def test_a_classifier_that_is_always_sure_has_a_map() -> None:
    # Many texts at 0 and 1, or nearer to them than the table tells apart.
    raw = np.repeat([0.0, 1e-9, 2e-8, 0.5, 1 - 1e-9, 1.0], 50)
    toxic = np.random.default_rng(0).random(300) < np.repeat([0.05, 0.1, 0.2, 0.5, 0.8, 0.95], 50)
    found = fit_isotonic(raw, toxic)
    assert [knot[0] for knot in found.knots] == [0, 0.5, 1]
    assert calibrated(raw[-50:], found) == pytest.approx(toxic[-100:].mean(), abs=1e-5)


def test_a_classifier_that_says_nothing_becomes_the_share_of_toxic_texts() -> None:
    right, toxic = texts(2000)
    for useless in (np.full(2000, 0.7), 1 - right):
        found = fit_isotonic(useless, toxic)
        assert calibrated(np.array([0.0, 0.7, 1.0]), found) == pytest.approx([toxic.mean()] * 3, abs=0.05)
    [knot] = fit_isotonic(np.full(2000, 0.7), toxic).knots
    assert knot == (0.7, pytest.approx(toxic.mean(), abs=1e-5))


@pytest.mark.parametrize(
    ("distort", "expected"),
    [(lambda z: z, "none"), (lambda z: 2.5 * z, "temperature"), (lambda z: z - 1.5, "isotonic")],
)
def test_auto_takes_the_simplest_that_does(distort, expected: str) -> None:
    for seed in range(3):
        right, toxic = texts(4000, seed)
        found = fit_map(expit(distort(logit(right))), toxic, "auto", seed)
        assert found.method == expected


def test_a_method_that_is_asked_for_is_taken() -> None:
    right, toxic = texts(400)
    assert fit_map(right, toxic, "isotonic").method == "isotonic"
    assert fit_map(right, toxic, "temperature").method == "temperature"
    assert calibrated(right, fit_map(right, toxic, "none")) == pytest.approx(right, abs=0)


def test_log_loss_equals_sklearns() -> None:
    right, toxic = texts(300)
    assert log_loss(right, toxic).mean() == pytest.approx(sklearn_log_loss(toxic, right), rel=1e-9)
    assert log_loss(np.array([0.0]), np.array([True]))[0] == pytest.approx(np.log(1e6))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"method": "isotonic"}, "does not go with its numbers"),
        ({"method": "none", "temperature": 2}, "does not go with its numbers"),
        ({"method": "isotonic", "knots": [[0, 0.5], [1, 0.4]]}, "do not rise"),
        ({"method": "isotonic", "knots": [[0.5, 0.1], [0.5, 0.2]]}, "do not rise"),
        ({"method": "isotonic", "knots": [[0, 0], [1, 1.5]]}, "not a pair of probabilities"),
        ({"method": "temperature", "temperature": 0}, "temperature = 0"),
        ({"method": "platt"}, "method = 'platt'"),
    ],
)
def test_impossible_maps(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_section(ProbabilityMap, tree)
