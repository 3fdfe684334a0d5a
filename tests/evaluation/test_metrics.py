import itertools
import math

import numpy as np
import pytest

from detox_ray.evaluation import metrics

pytestmark = pytest.mark.unit


def _reduction(base: np.ndarray, tuned: np.ndarray, resamples: int, seed: int) -> metrics.Interval:
    paired = metrics.reduction(metrics.mean_of(tuned), metrics.mean_of(base))
    return metrics.intervals({"reduction": paired}, resamples, seed)["reduction"]


def test_toxicity_metrics_equal_direct_loops():
    toxicity = np.random.default_rng(0).beta(0.4, 2, size=(37, 5))
    toxicity[0, 0] = 0.5
    maxima, with_toxic, toxic, total = [], 0, 0, 0.0
    for samples in toxicity:
        maximum, any_toxic = 0.0, False
        for value in samples:
            total += value
            maximum = max(maximum, value)
            if value >= 0.5:
                toxic += 1
                any_toxic = True
        maxima.append(maximum)
        with_toxic += any_toxic
    found = {name: values.mean() for name, values in metrics.toxicity_per_prompt(toxicity).items()}
    assert found["mean_toxicity"] == pytest.approx(total / 185, rel=1e-12)
    assert found["share_toxic"] == pytest.approx(toxic / 185, rel=1e-12)
    assert found["expected_maximum_toxicity"] == pytest.approx(sum(maxima) / 37, rel=1e-12)
    assert found["toxicity_probability"] == pytest.approx(with_toxic / 37, rel=1e-12)
    assert found["share_low"] == pytest.approx(sum(v < 0.33 for v in toxicity.ravel()) / 185)
    assert found["share_high"] == pytest.approx(sum(v > 0.66 for v in toxicity.ravel()) / 185)
    assert found["share_low"] + found["share_medium"] + found["share_high"] == pytest.approx(1)


def test_toxicity_metrics_by_hand():
    toxicity = np.array([[0.1, 0.9], [0.5, 0.2], [0.3, 0.4]])
    by_prompt = metrics.toxicity_per_prompt(toxicity)
    assert by_prompt["mean_toxicity"] == pytest.approx([0.5, 0.35, 0.35])
    assert by_prompt["share_toxic"] == pytest.approx([0.5, 0.5, 0])
    assert by_prompt["expected_maximum_toxicity"] == pytest.approx([0.9, 0.5, 0.4])
    assert by_prompt["toxicity_probability"].tolist() == [1, 1, 0]
    assert by_prompt["share_medium"] == pytest.approx([0, 0.5, 0.5])
    deviation = metrics.intervals({"std": metrics.standard_deviation_of(toxicity)}, 200, 0)["std"]
    assert deviation.value == pytest.approx(toxicity.std())


def test_bootstrap_interval_covers_the_truth_at_its_stated_rate():
    """2,000 simulated evaluations of 150 prompts; the resampled prompts are shared, which `resampled_means` is for."""
    prompts, simulations = 150, 2000
    values = np.random.default_rng(3).beta(0.6, 2.4, size=(prompts, simulations))
    draws = metrics.resampled_means(values, resamples=1000, seed=0)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    first = metrics.intervals({"first": metrics.mean_of(values[:, 0])}, resamples=1000, seed=0)["first"]
    assert (first.low, first.high) == pytest.approx((low[0], high[0]), rel=1e-9)
    coverage = np.mean((low <= 0.2) & (high >= 0.2))
    assert coverage == pytest.approx(0.95, abs=0.02)


def test_paired_reduction_covers_the_truth_at_its_stated_rate():
    """Base and tuned share the prompt's difficulty, as in a real comparison; the true reduction is 0.6."""
    prompts, simulations = 200, 600
    rng = np.random.default_rng(4)
    difficulty = rng.beta(1, 3, size=(simulations, prompts))
    base = difficulty * rng.uniform(0.5, 1.5, size=difficulty.shape)
    tuned = 0.4 * difficulty * rng.uniform(0.5, 1.5, size=difficulty.shape)
    covered = 0
    for i in range(simulations):
        interval = _reduction(base[i], tuned[i], resamples=300, seed=i)
        covered += interval.low <= 0.6 <= interval.high
    assert covered / simulations == pytest.approx(0.95, abs=0.03)


def test_weighted_interval_is_of_the_ratio_of_sums():
    values, weights = np.array([2.0, 8.0, 3.0]), np.array([1.0, 4.0, 0.0])
    both = {"ratio": metrics.ratio_of_sums(values, weights), "perplexity": metrics.perplexity_of(values, weights)}
    found = metrics.intervals(both, 500, 0)
    assert found["ratio"].value == pytest.approx(13 / 5)
    # A monotone function of a statistic has the function of its ends as interval.
    assert found["perplexity"] == pytest.approx(np.exp(found["ratio"]))


def test_paired_intervals_use_the_same_prompts_for_both_systems():
    """When tuned is exactly 0.3 x base, every resample has the same reduction, so the interval has no width."""
    base = np.random.default_rng(5).uniform(size=60)
    value, low, high = _reduction(base, 0.3 * base, resamples=400, seed=1)
    assert (value, low, high) == pytest.approx((0.7, 0.7, 0.7))


def test_reduction_of_nothing_is_undefined():
    assert all(math.isnan(v) for v in _reduction(np.zeros(5), np.ones(5), 200, 0))


def test_resampling_in_blocks_covers_every_resample(monkeypatch):
    values = np.random.default_rng(6).uniform(size=(50, 2))
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 50 * 7)
    draws = metrics.resampled_means(values, resamples=3000, seed=0)
    assert draws.mean(axis=0) == pytest.approx(values.mean(axis=0), abs=0.005)
    assert draws.std(axis=0) == pytest.approx(values.std(axis=0) / np.sqrt(50), rel=0.1)
    assert (
        metrics.resampled_means(values, 100, seed=3).tolist() == metrics.resampled_means(values, 100, seed=3).tolist()
    )


def test_permutation_p_value_against_all_sign_flips():
    base, tuned = np.array([0.9, 0.7, 0.4, 0.6, 0.8, 0.3]), np.array([0.2, 0.6, 0.5, 0.1, 0.3, 0.2])
    difference = tuned - base
    flips = [np.mean(difference * signs) for signs in itertools.product([-1, 1], repeat=6)]
    exact = np.mean(np.abs(flips) >= abs(difference.mean()) - 1e-12)
    assert metrics.paired_permutation_p_value(base, tuned, 20_000, 0) == pytest.approx(exact, abs=0.01)


def test_permutation_p_value_is_one_without_a_difference_and_never_zero():
    same = np.linspace(0, 1, 30)
    assert metrics.paired_permutation_p_value(same, same, 500, 0) == 1
    assert metrics.paired_permutation_p_value(same, same - 5, 500, 0) == pytest.approx(1 / 501)
