import numpy as np
import pytest

from detox_ray.classifier_config import Calibration, ClassifierConfig
from detox_ray.config import RewardConfig
from detox_ray.errors import RewardError
from detox_ray.rewards.ensemble import (
    UNCALIBRATED,
    aggregate,
    calibrate,
    calibrations,
    fit_calibration,
    with_calibrations,
)

pytestmark = pytest.mark.unit


def ensemble(**changes) -> RewardConfig:
    classifiers = [
        ClassifierConfig(name=name, kind="linear", model=f"module:{name}", weight=weight)
        for name, weight in (("a", 1.0), ("b", 3.0))
    ]
    return RewardConfig(classifiers=classifiers, **changes)


MEMBERS = {"a": np.array([1.0, -2.0]), "b": np.array([3.0, 0.0])}


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("mean", [2.0, -1.0]), ("min", [1.0, -2.0]), ("weighted", [2.5, -0.5]), ("mean_minus_std", [1.5, -1.5])],
)
def test_aggregation_by_hand(aggregation: str, expected: list[float]) -> None:
    scores = aggregate(MEMBERS, ensemble(aggregation=aggregation, std_coefficient=0.5))
    assert [s.reward for s in scores] == pytest.approx(expected)
    assert [s.disagreement for s in scores] == pytest.approx([1.0, 1.0])
    assert scores[1].per_classifier == {"a": -2.0, "b": 0.0}


def test_one_member_never_disagrees() -> None:
    config = RewardConfig(classifiers=[ClassifierConfig(name="a", kind="linear", model="m:a")])
    [score] = aggregate({"a": np.array([0.25])}, config)
    assert (score.reward, score.disagreement) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a": np.zeros(2)}, "do not fit"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, "different numbers"),
        ({"a": np.zeros(1), "b": np.array([np.inf])}, "'b'.*not finite"),
    ],
)
def test_answers_that_are_not_scores(members: dict, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        aggregate(members, ensemble())


def test_calibrated_scores_have_mean_0_and_std_1() -> None:
    scores = np.random.default_rng(0).normal(5.0, 3.0, size=100).astype(np.float32)
    calibrated = calibrate(scores, fit_calibration("a", scores))
    assert calibrated.dtype == np.float32
    assert calibrated.mean() == pytest.approx(0, abs=1e-5)
    assert calibrated.std() == pytest.approx(1, abs=1e-5)
    assert calibrate(np.array([7.0]), Calibration(mean=5.0, std=4.0)) == pytest.approx([0.5])


def test_a_score_far_from_all_that_was_seen_is_cut_unless_it_is_raw() -> None:
    civil = fit_calibration("a", np.log([0.975, 0.9751, 0.9752]))
    assert calibrate(np.log([0.01, 0.975, 0.9999999]), civil) == pytest.approx([-10, -1.22, 10], abs=0.01)
    assert calibrate(np.array([-30.0, 30.0]), UNCALIBRATED).tolist() == [-30, 30]


@pytest.mark.parametrize("scores", [np.full(10, 0.3), np.array([1.0]), np.array([1.0, np.nan])])
def test_scores_that_cannot_calibrate(scores: np.ndarray) -> None:
    with pytest.raises(RewardError, match="'a'"):
        fit_calibration("a", scores)


def test_calibrations_of_a_configuration() -> None:
    config = ensemble()
    with pytest.raises(RewardError, match=r"'a'.*fit"):
        calibrations(config)
    numbers = Calibration(mean=1.0, std=2.0)
    fitted = with_calibrations(config, {"a": numbers, "b": Calibration(mean=0.0, std=1.0)})
    assert calibrations(fitted)["a"] == numbers
    assert config.classifiers[0].calibration == "fit"
