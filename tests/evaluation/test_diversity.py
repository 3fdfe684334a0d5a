import itertools
import math

import numpy as np
import pytest

from detox_ray.evaluation.diversity import Diversity, distinct_n, distinct_n_per_prompt, equal_lengths

pytestmark = pytest.mark.unit


def test_distinct_n_by_hand():
    # Bigrams: ab bc | ab bd: four, three of them distinct.
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert distinct_n([[1, 1, 1, 1]], 1) == 1 / 4
    # An n-gram does not span two responses.
    assert distinct_n([[1, 2], [3]], 2) == 1
    assert math.isnan(distinct_n([[1], []], 2))


def test_equal_lengths_gives_the_same_number_of_ngrams_and_loses_as_little_as_it_can():
    rng = np.random.default_rng(1)
    for _ in range(50):
        base, tuned = ([list(range(n)) for n in rng.integers(0, 8, size=4)] for _ in range(2))
        kept = equal_lengths([base, tuned])
        assert sorted(kept[0]) == sorted(kept[1])
        assert all(
            k <= len(ids)
            for system, row in zip((base, tuned), kept, strict=True)
            for ids, k in zip(system, row, strict=True)
        )
        others = itertools.permutations(tuned)
        best = max(sum(min(len(b), len(t)) for b, t in zip(base, order, strict=True)) for order in others)
        assert kept[0].sum() == best


def test_equal_lengths_of_three_systems():
    systems = [[[1] * 5, [1] * 2], [[1] * 3, [1] * 4], [[1], [1] * 9]]
    assert equal_lengths(systems).tolist() == [[4, 1], [1, 4], [1, 4]]


def test_within_prompts_saying_less_is_not_rewarded():
    text = [[[1, 2, 1, 2, 1, 2], [3, 4, 3, 4, 3, 4]]]
    short = [[[1, 2], [3, 4]]]
    values = distinct_n_per_prompt([text, short], 2)
    assert values[0] == values[1] == 1
    nothing = distinct_n_per_prompt([text, [[[], []]]], 2)
    assert np.isnan(nothing).all()


def test_estimate_and_jackknife_equal_a_direct_count():
    rng = np.random.default_rng(3)
    for n in (1, 2, 3):
        texts = [[rng.integers(0, 12, rng.integers(0, 9)).tolist() for _ in range(3)] for _ in range(25)]
        same_lengths = [[rng.integers(0, 12, len(ids)).tolist() for ids in samples] for samples in texts]
        diversity = Diversity([texts, same_lengths], n)

        def direct(prompts, system, n=n):
            return distinct_n([ids for p in prompts for ids in system[p]], n)

        values, left_out = [], []
        for system in (texts, same_lengths):
            values.append(direct(range(25), system))
            left_out.append([direct([p for p in range(25) if p % 20 != g], system) for g in range(20)])
        assert diversity.of(0).value == pytest.approx(values[0])
        assert diversity.ratio(1, 0).value == pytest.approx(values[1] / values[0])
        ratios = np.array(left_out[1]) / np.array(left_out[0])
        error = math.sqrt(19 / 20 * ((ratios - ratios.mean()) ** 2).sum())
        # 2.093: the 97.5% quantile of Student's t with 19 degrees of freedom, from a table.
        assert diversity.ratio(1, 0).high == pytest.approx(values[1] / values[0] + 2.093 * error, abs=1e-4 * error)


def test_few_groups_have_wide_intervals():
    # Without one prompt at a time: 1, 3/4 and 3/4; so the standard error is 1/6, and t with 2 degrees of freedom 4.303.
    interval = Diversity([[[[1, 1]], [[2, 3]], [[4, 5]]]], 1).of(0)
    assert interval.value == pytest.approx(5 / 6)
    assert interval.high - interval.value == pytest.approx(4.3027 / 6, rel=1e-4)


def test_sees_what_is_said_to_every_prompt():
    rng = np.random.default_rng(0)
    varied = [[rng.integers(0, 1000, 12).tolist() for _ in range(3)] for _ in range(40)]
    stock = [[[1, 2, 3, 4, 5, 6, *ids[6:]] for ids in samples] for samples in varied]
    ratio = Diversity([varied, stock], 2).ratio(1, 0)
    assert ratio.low < ratio.value < ratio.high < 0.8
    within = distinct_n_per_prompt([varied, stock], 2)
    assert within[1].mean() / within[0].mean() > ratio.value + 0.05


def test_does_not_reward_saying_less():
    rng = np.random.default_rng(1)
    long = [[rng.integers(0, 30, 20).tolist() for _ in range(4)] for _ in range(50)]
    short = [[ids[:5] for ids in samples] for samples in long]
    assert Diversity([long, short], 2).ratio(1, 0).value == pytest.approx(1.0)


def test_intervals_cover_the_difference_between_samples():
    """The jackknife's 95% interval holds the mean of many samples of the same size about 95 times in 100."""
    rng = np.random.default_rng(2)
    words = 1 / np.arange(1, 400)
    words /= words.sum()
    results = []
    for _ in range(150):
        sample = [[rng.choice(399, 8, p=words).tolist() for _ in range(2)] for _ in range(60)]
        results.append(Diversity([sample], 2).of(0))
    truth = np.mean([r.value for r in results])
    assert np.mean([r.low <= truth <= r.high for r in results]) >= 0.88
