import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from detox_ray.evaluation.rank_metrics import roc_auc, spearman

pytestmark = pytest.mark.unit


def scores(number: int, seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.random(number)
    found = reference + rng.normal(0, 0.4, number)
    return (found.round(1), reference.round(1)) if ties else (found, reference)


@pytest.mark.parametrize("ties", [False, True])
def test_values_equal_those_of_other_libraries(ties: bool) -> None:
    found, reference = scores(301, 0, ties)
    assert roc_auc(found, reference >= 0.5, 100, 0).value == pytest.approx(roc_auc_score(reference >= 0.5, found))
    assert spearman(found, reference, 100, 0).value == pytest.approx(spearmanr(found, reference).statistic)


def test_every_resample_equals_the_statistic_of_the_rows_it_drew() -> None:
    found, reference = scores(40, 1, ties=True)
    rng = np.random.default_rng(7)
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=200)
    drawn = [np.repeat(np.arange(40), row) for row in counts]
    areas = [roc_auc_score(reference[rows] >= 0.5, found[rows]) for rows in drawn]
    correlations = [spearmanr(found[rows], reference[rows]).statistic for rows in drawn]
    area, correlation = roc_auc(found, reference >= 0.5, 200, 7), spearman(found, reference, 200, 7)
    assert (area.low, area.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])))
    assert (correlation.low, correlation.high) == pytest.approx(tuple(np.quantile(correlations, [0.025, 0.975])))


def test_by_hand() -> None:
    toxic = np.array([False, True, False, True])
    # Of four pairs three are in order and one is a tie.
    assert roc_auc(np.array([0.1, 0.4, 0.4, 0.9]), toxic, 100, 0).value == pytest.approx(3.5 / 4)
    assert spearman(np.array([1, 2, 3]), np.array([10, 20, 15]), 100, 0).value == pytest.approx(0.5)


def test_what_is_not_defined_is_nan() -> None:
    found, _ = scores(50, 2, ties=False)
    assert np.isnan(roc_auc(found, np.zeros(50, dtype=bool), 100, 0).value)
    assert np.isnan(spearman(found, np.full(50, 0.5), 100, 0).value)
    assert np.isnan(spearman(found, np.full(50, 0.5), 100, 0).low)
    # With one toxic text many resamples have none; the others make the interval.
    one = np.arange(50) == 3
    assert 0 <= roc_auc(found, one, 500, 0).low <= roc_auc(found, one, 500, 0).high <= 1
