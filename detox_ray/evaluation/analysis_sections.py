"""The sections of analysis.json from what was measured token by token; pure NumPy. The schema is in analysis.py."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detox_ray.evaluation.analysis_inputs import AnsweredPrompt
from detox_ray.evaluation.attribution import Attribution, normalized_entropy, prompt_share
from detox_ray.evaluation.metrics import TOXIC_THRESHOLD, Interval, difference, intervals, mean_of, ratio_of_sums
from detox_ray.evaluation.report_parts import jsonable
from detox_ray.evaluation.words import WordShift, mean_by_word, word_shifts
from detox_ray.rewards.classifiers import Classifier

FEWEST_AT_POSITION = 10  # responses: below this the entropy at a position is noise

Json = dict[str, Any]


@dataclass(frozen=True)
class TokenStatistics:
    """Of N responses, token by token in nats: `logprobs[i]`, `entropies[i]`: [R_i] float64."""

    logprobs: list[np.ndarray]
    entropies: list[np.ndarray]


# statistics[system][writer]: how the system sees the writer's responses.
Statistics = Mapping[str, Mapping[str, TokenStatistics]]


@dataclass(frozen=True)
class Comparison:
    """Which systems are compared, and how their intervals are made."""

    reference: str
    tuned: list[str]
    resamples: int
    seed: int

    @property
    def systems(self) -> list[str]:
        """The reference, then the tuned ones."""
        return [self.reference, *self.tuned]

    def per_token(self, values: Mapping[str, Sequence[np.ndarray]]) -> Json:
        """Means over all tokens, and their changes; `values[system]`: one array of tokens per prompt."""
        sums = {system: np.array([row.sum() for row in rows]) for system, rows in values.items()}
        return self._compared(
            sums, {system: np.array([float(len(r)) for r in rows]) for system, rows in values.items()}
        )

    def per_prompt(self, values: Mapping[str, Sequence[float] | np.ndarray]) -> Json:
        """Means over prompts, and their changes; a prompt at which any system's value is NaN is left out."""
        table = {system: np.asarray(row, dtype=np.float64) for system, row in values.items()}
        defined = ~np.isnan(np.stack(list(table.values()))).any(axis=0)
        kept = {system: row[defined] for system, row in table.items()}
        return self._compared(kept, {system: np.ones(len(row)) for system, row in kept.items()})

    def _compared(self, sums: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> Json:
        """`sums`, `weights`: [P] a system."""
        base = self.reference
        if not len(sums[base]):
            nothing = _interval_json(Interval(math.nan, math.nan, math.nan))
            return {"systems": dict.fromkeys(self.systems, nothing), "changes": dict.fromkeys(self.tuned, nothing)}

        means = {system: ratio_of_sums(sums[system], weights[system]) for system in self.systems}
        changes = {system: difference(means[system], means[base]) for system in self.tuned}
        return {
            "systems": _json_intervals(intervals(means, self.resamples, self.seed)),
            "changes": _json_intervals(intervals(changes, self.resamples, self.seed)),
        }


def logprob_section(comparison: Comparison, prompts: list[AnsweredPrompt], statistics: Statistics) -> Json:
    """How likely every system finds the reference's responses: all, the toxic and the civil ones."""
    toxic = np.array([p.responses[comparison.reference].toxicity >= TOXIC_THRESHOLD for p in prompts])
    splits = {"all": np.ones(len(prompts), dtype=bool), "toxic": toxic, "civil": ~toxic}
    seen = {system: statistics[system][comparison.reference].logprobs for system in comparison.systems}
    found = {}
    for split, mask in splits.items():
        kept = {s: [row for row, keep in zip(rows, mask, strict=True) if keep] for s, rows in seen.items()}
        found[split] = comparison.per_token(kept)
    return _by_system(found) | {"responses": {split: int(mask.sum()) for split, mask in splits.items()}}


def entropy_section(comparison: Comparison, statistics: Statistics) -> Json:
    """How undecided each system is along its own responses."""
    own = {system: statistics[system][system].entropies for system in comparison.systems}
    positions = {s: entropy_by_position(rows, comparison.resamples, comparison.seed) for s, rows in own.items()}
    return comparison.per_token(own) | {"by_position": positions}


def entropy_by_position(entropies: Sequence[np.ndarray], resamples: int, seed: int) -> list[Json]:
    """Mean entropy of the first, second, ... token, as far as at least 10 responses go; `entropies[i]`: [R_i] nats."""
    points: list[Json] = []
    for position in range(max(len(row) for row in entropies)):
        there = np.array([row[position] for row in entropies if len(row) > position])
        if len(there) < FEWEST_AT_POSITION:
            break
        interval = _interval_json(intervals({"mean": mean_of(there)}, resamples, seed)["mean"])
        points.append({"position": position + 1, "responses": len(there), **interval})
    return points


def attribution_section(
    comparison: Comparison, prompts: list[AnsweredPrompt], attributions: Mapping[str, list[Attribution]]
) -> Json:
    """How evenly the prompt is read, and how much of what is read is the prompt."""
    entropies, shares = {}, {}
    for system, found in attributions.items():
        pairs = list(zip(prompts, found, strict=True))
        entropies[system] = [normalized_entropy(a.tokens[p.start_length : len(p.token_ids)]) for p, a in pairs]
        shares[system] = [prompt_share(a.tokens, len(p.token_ids)) for p, a in pairs]
    errors = [a.relative_error for found in attributions.values() for a in found]
    measures = {"prompt_entropy": comparison.per_prompt(entropies), "prompt_share": comparison.per_prompt(shares)}
    return {"prompts": len(prompts), "relative_error": round(float(np.median(errors)), 6), **_by_system(measures)}


def relevance_section(comparison: Comparison, model: str, similarities: Mapping[str, np.ndarray]) -> Json:
    """How similar the responses are to their prompts; `similarities[system]`: [P] cosines."""
    return {"model": model, **comparison.per_prompt(similarities)}


def shifted_responses(
    comparison: Comparison,
    prompts: list[AnsweredPrompt],
    statistics: Statistics,
    pieces: Mapping[str, list[list[str]]],
) -> dict[str, list[Json]]:
    """For each tuned system the reference's and its own responses, with the shift of every token.

    `pieces[writer]`: the text of every token of the writer's responses.
    """
    base = comparison.reference
    return {
        tuned: [
            _shifted_response(
                prompt,
                writer,
                pieces[writer][row],
                statistics[tuned][writer].logprobs[row] - statistics[base][writer].logprobs[row],
            )
            for writer in (base, tuned)
            for row, prompt in enumerate(prompts)
        ]
        for tuned in comparison.tuned
    }


def _shifted_response(prompt: AnsweredPrompt, writer: str, pieces: list[str], shift: np.ndarray) -> Json:
    return {
        "system": writer,
        "prompt": prompt.text,
        "response": prompt.responses[writer].text,
        "toxicity": prompt.responses[writer].toxicity,
        "shift": round(float(shift.sum()), 4),
        "tokens": [{"text": p, "shift": round(float(s), 4)} for p, s in zip(pieces, shift, strict=True)],
    }


def word_section(shifted: Mapping[str, list[Json]], min_count: int, top: int, judge: Classifier | None) -> Json:
    """The `top` words each way that became less and more likely, for each tuned system."""
    systems = {}
    for tuned, responses in shifted.items():
        occurrences = [
            occurrence
            for response in responses
            for occurrence in word_shifts(
                [token["text"] for token in response["tokens"]], [token["shift"] for token in response["tokens"]]
            )
        ]
        means = mean_by_word(occurrences, min_count)
        systems[tuned] = {
            "less_likely": _word_rows([w for w in means if w.mean_shift < 0][:top], judge),
            "more_likely": _word_rows([w for w in reversed(means) if w.mean_shift > 0][:top], judge),
        }
    return {"min_count": min_count, "systems": systems}


def _word_rows(shifts: list[WordShift], judge: Classifier | None) -> list[Json]:
    toxicity = judge.toxicity([w.word for w in shifts]) if judge and shifts else None
    return [
        {
            "word": w.word,
            "shift": round(w.mean_shift, 4),
            "count": w.count,
            "toxic": None if toxicity is None else bool(toxicity[i] >= TOXIC_THRESHOLD),
        }
        for i, w in enumerate(shifts)
    ]


def choose_examples(shifted: list[Json], reference: str, number: int) -> list[Json]:
    """A third each: the reference's responses that fell most, the tuned system's that rose most, others at random.

    The last are the reference's first others: prompts come in a random order.
    """
    each = number // 3
    before = [row for row in shifted if row["system"] == reference]
    after = [row for row in shifted if row["system"] != reference]
    fell = sorted(before, key=lambda row: row["shift"])[:each]
    rose = sorted(after, key=lambda row: row["shift"], reverse=True)[:each]
    others = [row for row in before if row not in fell][: number - 2 * each]
    kinds = (("fell", fell), ("rose", rose), ("random", others))
    return [{"chosen": kind, **row} for kind, rows in kinds for row in rows]


def _by_system(measures: Mapping[str, Json]) -> Json:
    """The same numbers with the system above the measure: found[measure][part][system] -> [part][system][measure]."""
    first = next(iter(measures.values()))
    return {
        part: {name: {measure: found[part][name] for measure, found in measures.items()} for name in first[part]}
        for part in ("systems", "changes")
    }


def _json_intervals(found: Mapping[str, Interval]) -> Json:
    return {name: _interval_json(interval) for name, interval in found.items()}


def _interval_json(interval: Interval) -> Json:
    return jsonable(Interval(*(round(end, 6) for end in interval)))
