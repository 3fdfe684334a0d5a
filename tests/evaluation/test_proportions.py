"""Intervals of proportions against the published examples."""

import pytest

from detox_ray.evaluation.proportions import difference, p_value_above, p_value_above_rate, proportion

pytestmark = pytest.mark.unit


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", Table I, method 3 (score).
@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_score_interval_of_published_examples(count, total, low, high):
    found = proportion(count, total)
    assert found is not None
    assert found.value == count / total
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


# Newcombe 1998, "Interval estimation for the difference between independent proportions", Table II, method 10.
@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ],
)
def test_difference_of_published_examples(ours, theirs, low, high):
    first, second = proportion(*ours), proportion(*theirs)
    assert first is not None
    assert second is not None
    found = difference(first, second)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)
    mirrored = difference(second, first)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_more_confidence_is_a_wider_interval():
    first, second = proportion(56, 70), proportion(48, 80)
    assert first is not None
    assert second is not None
    usual, wider = difference(first, second), difference(first, second, confidence=0.99)
    assert wider.low < usual.low < usual.high < wider.high


def test_nothing_to_divide_by():
    assert proportion(0, 0) is None


def test_exact_p_values_by_counting():
    ours, theirs = proportion(3, 4), proportion(1, 4)
    assert ours is not None
    assert theirs is not None
    # Fisher's tea: of the 70 ways to choose 4 of 8 cups, 16 have three of ours and 1 has four.
    assert p_value_above(ours, theirs) == pytest.approx(17 / 70)
    # 4 * 0.1^3 * 0.9 + 0.1^4.
    assert p_value_above_rate(ours, 0.1) == pytest.approx(0.0037)
