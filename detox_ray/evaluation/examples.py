"""Which responses the report quotes: the prompts that changed most for the better and the worse, and some at random."""

import random
from dataclasses import dataclass

import numpy as np

from detox_ray.evaluation.evaluation_file import Evaluation, value
from detox_ray.evaluation.metric_format import UNKNOWN
from detox_ray.evaluation.paired_responses import PairedResponses
from detox_ray.evaluation.tables import reduction

EXAMPLES_OF_A_KIND = 4
RANDOM_PAIRS = 8
# A text of the page: a response of 100,000 characters says no more in full.
MAX_CHARACTERS = 2000


@dataclass(frozen=True)
class Example:
    """One prompt with a response of each system, and toxicity by the judge and reward of both."""

    prompt: str
    before: str
    after: str
    toxicity_before: float
    toxicity_after: float
    reward_before: float
    reward_after: float


@dataclass(frozen=True)
class SystemExamples:
    """The examples of one compared system; `pairs` are drawn at random. `summary` is of all its pairs."""

    system: str
    improved: list[Example]
    worsened: list[Example]
    pairs: list[Example]
    summary: str


def system_examples(responses: PairedResponses, evaluation: Evaluation, system: str) -> SystemExamples:
    """Examples of a system against the reference: no prompt twice among the improved, the worsened and the pairs."""
    first, second = responses.place(evaluation["reference"]), responses.place(system)
    bounds = responses.prompt_bounds()
    worst = [
        (
            start + _most_toxic(responses.toxicity[first, start:end]),
            start + _most_toxic(responses.toxicity[second, start:end]),
        )
        for start, end in bounds
    ]
    drops = np.array([responses.toxicity[first, b] - responses.toxicity[second, a] for b, a in worst])
    known = np.flatnonzero(~np.isnan(drops))
    ranked = known[np.argsort(-drops[known], kind="stable")]
    improved = [int(p) for p in ranked[:EXAMPLES_OF_A_KIND] if drops[p] > 0]
    worsened = [int(p) for p in ranked[::-1][:EXAMPLES_OF_A_KIND] if drops[p] < 0]
    others = sorted(set(known.tolist()) - {*improved, *worsened})
    generator = random.Random(evaluation.get("seed") or 0)
    drawn = [np.arange(*bounds[p]) for p in generator.sample(others, min(RANDOM_PAIRS, len(others)))]
    scored = ~np.isnan(responses.toxicity[[first, second]]).any(axis=0)
    at_random = [int(generator.choice(pairs[scored[pairs]])) for pairs in drawn if scored[pairs].any()]
    return SystemExamples(
        system,
        [_example(responses, first, second, *worst[p]) for p in improved],
        [_example(responses, first, second, *worst[p]) for p in worsened],
        [_example(responses, first, second, n, n) for n in at_random],
        pairs_summary(responses, evaluation, system),
    )


def pairs_summary(responses: PairedResponses, evaluation: Evaluation, system: str) -> str:
    """What changed over all pairs: mean and std of the reward, and the improvement of those of toxicity in %."""
    reference = evaluation["reference"]
    before, after = (responses.reward[responses.place(name)] for name in (reference, system))
    known = ~(np.isnan(before) | np.isnan(after))
    toxicity = {
        metric: [value(evaluation, name, metric) for name in (reference, system)]
        for metric in ("mean_toxicity", "std_toxicity")
    }
    mean, std = (reduction(*pair) for pair in toxicity.values())
    rewards = (
        f"mean reward {before[known].mean():.3f} before, {after[known].mean():.3f} after, "
        f"difference {(after - before)[known].mean():+.3f}{_change(before[known].mean(), after[known].mean())}; "
        f"std {before[known].std():.3f} before, {after[known].std():.3f} after"
        f"{_change(before[known].std(), after[known].std())}"
        if known.any()
        else "no reward is known"
    )
    improvement = f"Improvement of toxicity: mean {_percent(mean)}, std {_percent(std)}."
    return f"All {int(known.sum()):,} pairs: {rewards}. {improvement}"


def _change(before: float, after: float) -> str:
    """` (+12.3%)`, or nothing where the change is of something that is not positive."""
    return f" ({after / before - 1:+.1%})" if before > 0 else ""


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.1%}"


def _most_toxic(toxicity: np.ndarray) -> int:
    """Place of the largest; NaN only wins where there is nothing else."""
    return int(np.argmax(np.where(np.isnan(toxicity), -np.inf, toxicity)))


def _example(responses: PairedResponses, first: int, second: int, before: int, after: int) -> Example:
    return Example(
        _shortened(responses.prompts[before].as_py()),
        _shortened(responses.responses[first][before].as_py()),
        _shortened(responses.responses[second][after].as_py()),
        float(responses.toxicity[first, before]),
        float(responses.toxicity[second, after]),
        float(responses.reward[first, before]),
        float(responses.reward[second, after]),
    )


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … ({len(text) - MAX_CHARACTERS:,} more characters)"
