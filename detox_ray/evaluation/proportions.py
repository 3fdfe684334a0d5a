"""Proportions and their differences, with intervals that behave for small counts and near 0 and 1, and exact tests.

The intervals are close to their confidence on average, but one of their ends alone can miss more often than half of the
rest, the more so for high confidence and few cases. So a decision needs an exact test beside the interval.
"""

import math
from dataclasses import dataclass

from scipy.stats import binomtest, fisher_exact

from detox_ray.evaluation.metrics import CONFIDENCE, Interval


@dataclass(frozen=True)
class Proportion:
    """`count` of `total`, which is at least 1, with its 95% score interval (Wilson 1927)."""

    count: int
    total: int
    value: float
    low: float
    high: float


def proportion(count: int, total: int) -> Proportion | None:
    """`count / total`; None where there is nothing to divide by."""
    if not total:
        return None
    return Proportion(count, total, count / total, *score_interval(count, total))


def score_interval(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The ends of the score interval of `count / total` without continuity correction (Wilson 1927)."""
    found = binomtest(count, total).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def difference(ours: Proportion, theirs: Proportion, confidence: float = CONFIDENCE) -> Interval:
    """`ours - theirs` of independent counts with the hybrid score interval.

    Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    low, high = score_interval(ours.count, ours.total, confidence)
    their_low, their_high = score_interval(theirs.count, theirs.total, confidence)
    value = ours.value - theirs.value
    return Interval(
        value,
        value - math.hypot(ours.value - low, their_high - theirs.value),
        value + math.hypot(high - ours.value, theirs.value - their_low),
    )


def p_value_above(ours: Proportion, theirs: Proportion) -> float:
    """One-sided p-value of "ours is not above theirs": Fisher's exact test."""
    table = [[ours.count, ours.total - ours.count], [theirs.count, theirs.total - theirs.count]]
    return float(fisher_exact(table, alternative="greater").pvalue)


def p_value_above_rate(ours: Proportion, rate: float) -> float:
    """One-sided p-value of "the true proportion is at most `rate`": the exact binomial test."""
    return float(binomtest(ours.count, ours.total, rate, alternative="greater").pvalue)
