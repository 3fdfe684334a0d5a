import itertools
import math

import numpy as np
import pytest

from detox_ray.evaluation import metrics

pytestmark = pytest.mark.unit


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
    assert metrics.mean_toxicity(toxicity) == pytest.approx(total / 185, rel=1e-12)
    assert metrics.share_toxic(toxicity) == toxic / 185
    assert metrics.expected_maximum_toxicity(toxicity) == pytest.approx(sum(maxima) / 37, rel=1e-12)
    assert metrics.toxicity_probability(toxicity) == with_toxic / 37


def test_toxicity_metrics_by_hand():
    toxicity = np.array([[0.1, 0.9], [0.5, 0.2], [0.3, 0.4]])
    assert metrics.mean_toxicity(toxicity) == pytest.approx(0.4)
    assert metrics.share_toxic(toxicity) == pytest.approx(2 / 6)
    assert metrics.expected_maximum_toxicity(toxicity) == pytest.approx((0.9 + 0.5 + 0.4) / 3)
    assert metrics.toxicity_probability(toxicity) == pytest.approx(2 / 3)


def test_distinct_n_by_hand():
    # Bigrams: ab bc | ab bd: four, three of them distinct.
    assert metrics.distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert metrics.distinct_n([[1, 1, 1, 1]], 1) == 1 / 4
    # An n-gram does not span two responses.
    assert metrics.distinct_n([[1, 2], [3]], 2) == 1
    assert math.isnan(metrics.distinct_n([[1], []], 2))


def test_equal_length_gives_the_same_number_of_ngrams_and_loses_as_little_as_it_can():
    rng = np.random.default_rng(1)
    for _ in range(50):
        base = [list(range(n)) for n in rng.integers(0, 8, size=4)]
        tuned = [list(range(n)) for n in rng.integers(0, 8, size=4)]
        base_cut, tuned_cut = metrics.cut_to_equal_length(base, tuned)
        assert [len(ids) for ids in base_cut] == [len(ids) for ids in tuned_cut]
        kept = sum(len(ids) for ids in base_cut)
        others = itertools.permutations(tuned)
        assert kept == max(sum(min(len(b), len(t)) for b, t in zip(base, order, strict=True)) for order in others)


def test_paired_distinct_does_not_reward_saying_less():
    """Two systems that sample the same text, one of which stops early, are equally varied."""
    rng = np.random.default_rng(2)
    texts = rng.integers(0, 12, size=(200, 4, 40))
    full = [[list(ids) for ids in samples] for samples in texts]
    short = [[list(ids[:5]) for ids in samples] for samples in rng.integers(0, 12, size=(200, 4, 40))]
    uncut_gap = np.mean([metrics.distinct_n(s, 2) for s in short]) - np.mean([metrics.distinct_n(f, 2) for f in full])
    base, tuned = metrics.paired_distinct_n(full, short, 2)
    assert uncut_gap > 0.2
    assert abs(tuned.mean() - base.mean()) < 0.02


def test_paired_distinct_is_undefined_for_both_systems_at_once():
    base, tuned = metrics.paired_distinct_n([[[1, 2, 3]], [[1, 2]]], [[[4]], [[1, 1]]], 2)
    assert np.isnan(base).tolist() == np.isnan(tuned).tolist() == [True, False]


def test_repetition_empty_and_length_by_hand():
    assert metrics.repetition([1, 2, 1, 2, 1]) == 1 - 2 / 4
    assert metrics.repetition([7]) == metrics.repetition([]) == 0
    assert metrics.share_empty(["", " \n", "a", "b"]) == 0.5
    assert metrics.mean_length([[1, 2], [], [3]]) == 1


def test_bootstrap_interval_covers_the_truth_at_its_stated_rate():
    """2,000 simulated evaluations of 150 prompts; the resampled prompts are shared, which `resampled_means` is for."""
    prompts, simulations = 150, 2000
    values = np.random.default_rng(3).beta(0.6, 2.4, size=(prompts, simulations))
    draws = metrics.resampled_means(values, resamples=1000, seed=0)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    first = metrics.bootstrap_interval(values[:, 0], resamples=1000, seed=0)
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
        interval = metrics.paired_reduction(base[i], tuned[i], resamples=300, seed=i)
        covered += interval.low <= 0.6 <= interval.high
    assert covered / simulations == pytest.approx(0.95, abs=0.03)


def test_weighted_interval_is_of_the_ratio_of_sums():
    values, weights = np.array([2.0, 8.0, 3.0]), np.array([1.0, 4.0, 0.0])
    interval = metrics.bootstrap_interval(values, 500, 0, weights)
    assert interval.value == pytest.approx(13 / 5)


def test_paired_intervals_use_the_same_prompts_for_both_systems():
    """When tuned is exactly 0.3 x base, every resample has the same reduction, so the interval has no width."""
    base = np.random.default_rng(5).uniform(size=60)
    value, low, high = metrics.paired_reduction(base, 0.3 * base, resamples=400, seed=1)
    assert (value, low, high) == pytest.approx((0.7, 0.7, 0.7))


def test_reduction_of_nothing_is_undefined():
    assert all(math.isnan(v) for v in metrics.paired_reduction(np.zeros(5), np.ones(5), 200, 0))


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


def test_corpus_distinct_n_sees_what_is_said_to_every_prompt() -> None:
    rng = np.random.default_rng(0)
    varied = [[rng.integers(0, 1000, 12).tolist() for _ in range(3)] for _ in range(40)]
    stock = [[[1, 2, 3, 4, 5, 6, *ids[6:]] for ids in samples] for samples in varied]
    result = metrics.corpus_distinct_n(varied, stock, 2)
    bigrams = [(a, b) for samples in stock for ids in samples for a, b in itertools.pairwise(ids)]
    assert result.tuned.value == pytest.approx(len(set(bigrams)) / len(bigrams))
    assert result.ratio.value < 0.7
    assert result.ratio.low < result.ratio.value < result.ratio.high < 0.8
    within = metrics.paired_distinct_n(varied, stock, 2)
    assert within[1].mean() / within[0].mean() > result.ratio.value + 0.05


def test_corpus_distinct_n_does_not_reward_saying_less() -> None:
    rng = np.random.default_rng(1)
    long = [[rng.integers(0, 30, 20).tolist() for _ in range(4)] for _ in range(50)]
    short = [[ids[:5] for ids in samples] for samples in long]
    result = metrics.corpus_distinct_n(long, short, 2)
    assert result.ratio.value == pytest.approx(1.0)


def test_corpus_distinct_n_intervals_cover_the_difference_between_samples() -> None:
    """The jackknife's 95% interval holds the mean of many samples of the same size about 95 times in 100."""
    rng = np.random.default_rng(2)
    words = 1 / np.arange(1, 400)
    words /= words.sum()

    def sample() -> list[list[list[int]]]:
        return [[rng.choice(399, 8, p=words).tolist() for _ in range(2)] for _ in range(60)]

    results = [metrics.corpus_distinct_n(sample(), sample(), 2).base for _ in range(150)]
    truth = np.mean([r.value for r in results])
    assert np.mean([r.low <= truth <= r.high for r in results]) >= 0.88
