"""How well scores order texts: ROC-AUC and Spearman's correlation, with bootstrap intervals over texts. Pure NumPy."""

from collections.abc import Callable

import numpy as np

from detox_ray.evaluation.metrics import Interval, percentile_interval, resampled_counts

# Counts `[R, N]`, how often each text is drawn -> the statistic `[R]`; NaN where a draw does not define it.
OfDraws = Callable[[np.ndarray], np.ndarray]


def roc_auc(scores: np.ndarray, toxic: np.ndarray, resamples: int, seed: int) -> Interval:
    """The chance that a toxic text scores above another, ties counted half: `scores: [N]`, `toxic: [N] bool`."""
    toxic = np.asarray(toxic, dtype=bool)
    midranks = _midranks(scores)

    def of_draws(counts: np.ndarray) -> np.ndarray:
        positives = counts[:, toxic].sum(axis=1)
        negatives = counts.sum(axis=1) - positives
        # Mann and Whitney 1947.
        above = (counts * midranks(counts))[:, toxic].sum(axis=1) - positives * (positives + 1) / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            return above / (positives * negatives)

    return _bootstrapped(of_draws, len(toxic), resamples, seed)


def spearman(scores: np.ndarray, reference: np.ndarray, resamples: int, seed: int) -> Interval:
    """Pearson's correlation of the ranks, ties at their mean rank: `scores, reference: [N]`; NaN if one is constant."""
    midranks, reference_midranks = _midranks(scores), _midranks(reference)

    def of_draws(counts: np.ndarray) -> np.ndarray:
        # The mean of ranks is known, whatever ties there are.
        middle = (counts.sum(axis=1, keepdims=True) + 1) / 2
        ours, theirs = midranks(counts) - middle, reference_midranks(counts) - middle
        products = [(counts * a * b).sum(axis=1) for a, b in ((ours, theirs), (ours, ours), (theirs, theirs))]
        with np.errstate(invalid="ignore", divide="ignore"):
            return products[0] / np.sqrt(products[1] * products[2])

    return _bootstrapped(of_draws, len(reference), resamples, seed)


def _midranks(values: np.ndarray) -> OfDraws:
    """Counts `[R, N]` -> the rank of each text among those drawn `[R, N]`, from 1, ties at their mean rank."""
    _, tie, sizes = np.unique(values, return_inverse=True, return_counts=True)
    order, first = np.argsort(tie, kind="stable"), np.cumsum(sizes) - sizes

    def of_draws(counts: np.ndarray) -> np.ndarray:
        drawn = np.add.reduceat(counts[:, order], first, axis=1)
        return (np.cumsum(drawn, axis=1) - drawn + (drawn + 1) / 2)[:, tie]

    return of_draws


def _bootstrapped(statistic: OfDraws, texts: int, resamples: int, seed: int) -> Interval:
    blocks = (statistic(counts) for counts in resampled_counts(texts, resamples, seed))
    return percentile_interval(np.concatenate([statistic(np.ones((1, texts))), *blocks]))
