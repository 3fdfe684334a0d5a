"""Distinct-n at equal token counts, within each prompt and over everything a system says.

Distinct-n falls as there is more text, so a system that merely says less would look more diverse. Before anything is
counted, each system's responses are sorted by length and the k-th longest of every system are cut to the shortest of
them: all systems then hold the same number of n-grams for every n.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student_t

from detox_ray.evaluation.metrics import CONFIDENCE, Interval

Tokens = Sequence[int]
GROUPS = 20
EQUAL_COUNTS = (
    "equal token counts: the k-th longest response of every system is cut to the shortest k-th longest; distinct_n is "
    "over all responses, distinct_n_per_prompt over those of a prompt, averaged"
)


def distinct_n(responses: Sequence[Tokens], n: int) -> float:
    """Distinct n-grams of the responses divided by all their n-grams (Li et al. 2016), in (0, 1]; NaN without any.

    Averaged over prompts this is the distinct-n of Liu et al. 2021 (DExperts), except that they divide by the number
    of words, and so never reach 1 for n > 1.
    """
    ngrams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def equal_lengths(systems: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """How much of each response is kept so that all systems hold the same numbers of tokens, `[systems, N] int64`.

    Deterministic: ties keep their order.

    Raises:
        ValueError: the systems have different numbers of responses.
    """
    lengths = np.array([[len(ids) for ids in responses] for responses in systems], dtype=np.int64)
    order = np.argsort(-lengths, axis=1, kind="stable")
    kept = np.empty_like(lengths)
    np.put_along_axis(kept, order, np.take_along_axis(lengths, order, axis=1).min(axis=0)[None, :], axis=1)
    return kept


def distinct_n_per_prompt(systems: Sequence[Sequence[Sequence[Tokens]]], n: int) -> np.ndarray:
    """`distinct_n` of every prompt's responses, `[systems, P]`; NaN, in all systems at once, without an n-gram.

    `systems`: token ids, [systems][P][S][tokens].
    """
    values = np.empty((len(systems), len(systems[0])))
    for prompt, of_prompt in enumerate(zip(*systems, strict=True)):
        for system, (responses, kept) in enumerate(zip(of_prompt, equal_lengths(of_prompt), strict=True)):
            values[system, prompt] = distinct_n([ids[:k] for ids, k in zip(responses, kept, strict=True)], n)
    return values


class Diversity:
    """Distinct-n of several systems over the same P prompts at equal token counts, with jackknife intervals.

    Unlike the mean over prompts, distinct-n over all responses falls when a system says the same to different prompts.
    The 95% intervals leave out one of `GROUPS` groups of prompts at a time: resampling with replacement, as the
    bootstrap does, would repeat responses and so lower what is measured.
    """

    def __init__(self, systems: Sequence[Sequence[Sequence[Tokens]]], n: int) -> None:
        """`systems`: token ids, [systems][P][S][tokens]."""
        flat = [[ids for samples in system for ids in samples] for system in systems]
        groups = min(GROUPS, len(systems[0]))
        group_of = np.repeat(np.arange(len(systems[0])) % groups, len(systems[0][0]))
        tables = [_counts(r, kept, group_of, n, groups) for r, kept in zip(flat, equal_lengths(flat), strict=True)]
        self._estimate, self._left_out = (np.array(values) for values in zip(*tables, strict=True))

    def of(self, system: int) -> Interval:
        """Distinct n-grams divided by n-grams."""
        return _jackknife(self._estimate[system], self._left_out[system])

    def ratio(self, system: int, base: int) -> Interval:
        """Of a system to another, paired."""
        return _jackknife(self._estimate[system] / self._estimate[base], self._left_out[system] / self._left_out[base])


def _counts(
    responses: Sequence[Tokens], kept: np.ndarray, group_of: np.ndarray, n: int, groups: int
) -> tuple[float, np.ndarray]:
    """Distinct-n of the responses cut to `kept`, and without each group, `[groups]`; `group_of: [N]`."""
    windows, owners = [], []
    for ids, length, group in zip(responses, kept, group_of, strict=True):
        if length >= n:
            rows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids[:length], dtype=np.int64), n)
            windows.append(rows)
            owners.append(np.full(len(rows), group))
    if not windows:
        return math.nan, np.full(groups, math.nan)
    codes, owner = _codes(np.concatenate(windows)), np.concatenate(owners)
    total = np.bincount(owner, minlength=groups)
    pairs = np.unique(np.stack([codes, owner], axis=1), axis=0)
    occurs_in = np.bincount(pairs[:, 0])
    # An n-gram of one group alone is gone when that group is.
    only_here = np.bincount(pairs[occurs_in[pairs[:, 0]] == 1, 1], minlength=groups)
    distinct = len(occurs_in)
    with np.errstate(invalid="ignore", divide="ignore"):
        return distinct / len(codes), (distinct - only_here) / (len(codes) - total)


def _codes(windows: np.ndarray) -> np.ndarray:
    """A number for each different row of `windows: [N, n]`, counted from 0."""
    codes = np.unique(windows[:, 0], return_inverse=True)[1]
    for column in windows.T[1:]:
        codes = codes * (int(column.max()) + 1) + column
        codes = np.unique(codes, return_inverse=True)[1]
    return codes


def _jackknife(estimate: float, left_out: np.ndarray) -> Interval:
    """The estimate with its 95% interval, by Student's t, from the values without each group (Miller 1974)."""
    groups = len(left_out)
    if groups < 2 or not np.isfinite(left_out).all():
        return Interval(float(estimate), math.nan, math.nan)
    error = math.sqrt((groups - 1) / groups * float(((left_out - left_out.mean()) ** 2).sum()))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, groups - 1)) * error
    return Interval(float(estimate), float(estimate - half), float(estimate + half))
