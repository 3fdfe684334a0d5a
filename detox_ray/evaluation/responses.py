"""The responses of a system, what was measured of each, and the Parquet file that keeps both."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from detox_ray.errors import DataError, first_line
from detox_ray.records import LEAD, REFERENCES, Prompt, Rollout

SCORE_PREFIX = "toxicity/"
WORDS = "words"  # what responses are counted in where systems do not share their tokens
# Columns of a table whose prompts have them.
OPTIONAL = [pa.field(REFERENCES, pa.list_(pa.string())), pa.field(LEAD, pa.string())]
SCHEMA = pa.schema(
    [
        pa.field("system", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_toxicity", pa.float64()),
        pa.field("challenging", pa.bool_()),
        pa.field("group", pa.string()),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("adapter_version", pa.int64(), nullable=False),
        pa.field("toxicity", pa.float64(), nullable=False),
        pa.field("nll", pa.float64()),
        pa.field("nll_tokens", pa.int32()),
        pa.field("relevance", pa.float64()),
    ]
)


@dataclass(frozen=True)
class SystemResponses:
    """What one system (a model, with or without an adapter, or a file) answered: P prompts, S responses to each.

    `prompts: [P]`; `rollouts: [P][S]`, whose `response_ids` hold no end token, nor anything after one.
    """

    name: str
    prompts: list[Prompt]
    rollouts: list[list[Rollout]]

    @property
    def samples_per_prompt(self) -> int:
        """S."""
        return len(self.rollouts[0])

    @property
    def flat(self) -> list[Rollout]:
        """All P * S rollouts, prompt by prompt."""
        return [rollout for samples in self.rollouts for rollout in samples]


@dataclass(frozen=True)
class ScoredResponses:
    """The responses of a system with what was measured of each.

    `toxicity`: scorer -> [P, S] in [0, 1], the judge first; `nll: [P, S]` in nats of `nll_tokens: [P, S]` tokens, under
    the perplexity model and given the prompt; `relevance: [P, S]` cosine of prompt and response. The last three are
    None when they were not measured.
    """

    responses: SystemResponses
    toxicity: dict[str, np.ndarray]
    nll: np.ndarray | None = None
    nll_tokens: np.ndarray | None = None
    relevance: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Of the system."""
        return self.responses.name

    @property
    def token_ids(self) -> list[list[list[int]]]:
        """[P][S][tokens]."""
        return [[r.response_ids.tolist() for r in samples] for samples in self.responses.rollouts]


def group_rollouts(
    name: str, rollouts: Sequence[Rollout], prompts: Sequence[Prompt], end_ids: Sequence[int] = ()
) -> SystemResponses:
    """Rollouts in any order, gathered by prompt in the order of `prompts`, and cut at their end token.

    Raises:
        DataError: there are none, or prompts have different numbers of responses.
    """
    by_prompt: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_id, []).append(_without_end(rollout, end_ids))
    if not by_prompt:
        raise DataError(f"system {name!r} has no responses to measure")
    counts = {prompt_id: len(samples) for prompt_id, samples in by_prompt.items()}
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[fewest] != counts[most]:
        raise DataError(
            f"system {name!r}: prompt {fewest!r} has {counts[fewest]} responses, prompt {most!r} has {counts[most]}; "
            "the metrics need the same number for every prompt"
        )
    answered = [prompt for prompt in prompts if prompt.id in by_prompt]
    return SystemResponses(name, answered, [by_prompt[prompt.id] for prompt in answered])


def align(systems: Sequence[SystemResponses]) -> list[SystemResponses]:
    """The systems with the prompts of the first, so that prompt i is the same text in all.

    What is known of a prompt (`meta`) is brought together: each value from the first system that has it.

    Raises:
        DataError: they answered different prompts, or different numbers of responses to each, or share a name.
    """
    first = systems[0]
    ours = {prompt.id for prompt in first.prompts}
    meta: dict[str, dict[str, Any]] = {}
    for prompt in (prompt for system in reversed(systems) for prompt in system.prompts):
        known = {key: value for key, value in prompt.meta.items() if value is not None}
        meta[prompt.id] = meta.get(prompt.id, {}) | known
    prompts = [replace(prompt, meta=meta[prompt.id]) for prompt in first.prompts]
    aligned = [replace(first, prompts=prompts)]
    for other in systems[1:]:
        theirs = {prompt.id for prompt in other.prompts}
        if ours != theirs:
            raise DataError(
                f"{first.name!r} and {other.name!r} answered different prompts ({len(ours - theirs)} only the first, "
                f"{len(theirs - ours)} only the second): a paired comparison needs the same prompts"
            )
        if first.samples_per_prompt != other.samples_per_prompt:
            raise DataError(
                f"{first.name!r} gives {first.samples_per_prompt} responses per prompt, "
                f"{other.name!r} gives {other.samples_per_prompt}: "
                "the maximum over a prompt's responses grows with their number, so give both the same"
            )
        if other.name in {system.name for system in aligned}:
            raise DataError(f"two systems are called {other.name!r}: give each its own name")
        rollouts = [other.rollouts[row] for row in rows_like(other.prompts, first.prompts)]
        aligned.append(SystemResponses(other.name, prompts, rollouts))
    return aligned


def in_words(responses: SystemResponses) -> SystemResponses:
    """The responses with the ids of their words for tokens."""
    counted = [
        [replace(rollout, response_ids=np.array(word_ids(rollout.text), dtype=np.int64)) for rollout in samples]
        for samples in responses.rollouts
    ]
    return replace(responses, rollouts=counted)


def word_ids(text: str) -> list[int]:
    """A number for each word; of 31 bits, as they are kept as int32."""
    return [zlib.crc32(word.encode()) >> 1 for word in text.split()]


def rows_like(prompts: Sequence[Prompt], order: Sequence[Prompt]) -> list[int]:
    """Where each prompt of `order` stands in `prompts`, which has the same ones."""
    position = {prompt.id: row for row, prompt in enumerate(prompts)}
    return [position[prompt.id] for prompt in order]


def generations_table(systems: Sequence[ScoredResponses]) -> pa.Table:
    """One row per response, with the columns of `SCHEMA`, what is there of `OPTIONAL`, and one per scorer.

    System by system, prompt by prompt.
    """
    scorers = list(systems[0].toxicity)
    schema = SCHEMA
    for field in OPTIONAL:
        if any(field.name in prompt.meta for prompt in systems[0].responses.prompts):
            schema = schema.append(field)
    for scorer in scorers:
        schema = schema.append(pa.field(SCORE_PREFIX + scorer, pa.float64(), nullable=False))
    return pa.concat_tables(_system_table(system, scorers, schema) for system in systems)


def _system_table(system: ScoredResponses, scorers: Sequence[str], schema: pa.Schema) -> pa.Table:
    samples = system.responses.samples_per_prompt
    rollouts = system.responses.flat
    prompts = [prompt for prompt in system.responses.prompts for _ in range(samples)]
    unknown = [None] * len(rollouts)

    def optional(values: np.ndarray | None) -> Any:
        return unknown if values is None else values.ravel()

    columns = {
        "system": [system.name] * len(rollouts),
        "prompt_id": [prompt.id for prompt in prompts],
        "prompt": [prompt.text for prompt in prompts],
        "prompt_toxicity": [published_number(prompt.meta.get("toxicity")) for prompt in prompts],
        "challenging": [_flag(prompt.meta.get("challenging")) for prompt in prompts],
        "group": [_text(prompt.meta.get("group")) for prompt in prompts],
        REFERENCES: [prompt.meta.get(REFERENCES) for prompt in prompts],
        LEAD: [prompt.meta.get(LEAD) for prompt in prompts],
        "sample": np.tile(np.arange(samples, dtype=np.int32), len(system.responses.prompts)),
        "response": [rollout.text for rollout in rollouts],
        "response_ids": [rollout.response_ids for rollout in rollouts],
        "finish_reason": [rollout.finish_reason for rollout in rollouts],
        "tokens": [len(rollout.response_ids) for rollout in rollouts],
        "adapter_version": [rollout.adapter_version for rollout in rollouts],
        "toxicity": system.toxicity[scorers[0]].ravel(),
        "nll": optional(system.nll),
        "nll_tokens": optional(system.nll_tokens),
        "relevance": optional(system.relevance),
    } | {SCORE_PREFIX + scorer: system.toxicity[scorer].ravel() for scorer in scorers}
    return pa.table({name: pa.array(columns[name], type=schema.field(name).type) for name in schema.names}, schema)


def systems_of(table: pa.Table) -> list[ScoredResponses]:
    """The systems whose responses a generations table holds, in the order they stand in it; errors as `align`."""
    scorers = [name.removeprefix(SCORE_PREFIX) for name in table.column_names if name.startswith(SCORE_PREFIX)]
    found = []
    for name in table.column("system").unique().to_pylist():
        rows = table.filter(pc.equal(table.column("system"), name))
        rows = rows.sort_by([("prompt_id", "ascending"), ("sample", "ascending")])
        columns = {*SCHEMA.names, *(field.name for field in OPTIONAL)} - {"nll"}
        records = rows.select([name for name in rows.column_names if name in columns]).to_pylist()
        prompts = {r["prompt_id"]: _prompt(r) for r in records}
        responses = group_rollouts(name, [_rollout(r) for r in records], list(prompts.values()))
        shape = (len(prompts), responses.samples_per_prompt)

        def matrix(column: str, rows: pa.Table = rows, shape: tuple[int, int] = shape) -> np.ndarray | None:
            values = rows.column(column)
            return None if values.null_count else values.to_numpy().reshape(shape)

        toxicity = {scorer: values for scorer in scorers if (values := matrix(SCORE_PREFIX + scorer)) is not None}
        found.append(ScoredResponses(responses, toxicity, matrix("nll"), matrix("nll_tokens"), matrix("relevance")))
    return found


def published_number(value: Any) -> float | None:
    """A published score, from whatever a file holds; None for null, NaN and text that is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _prompt(row: Mapping[str, Any]) -> Prompt:
    meta = {"toxicity": row["prompt_toxicity"], "challenging": row["challenging"], "group": row["group"]}
    meta |= {field.name: row.get(field.name) for field in OPTIONAL}
    return Prompt(row["prompt_id"], row["prompt"], (), {k: v for k, v in meta.items() if v is not None})


def _rollout(row: Mapping[str, Any]) -> Rollout:
    ids = np.array(row["response_ids"], dtype=np.int64)
    nothing = np.zeros(0, dtype=np.float32)
    return Rollout(
        row["prompt_id"], row["prompt"], np.zeros(0, dtype=np.int64), ids, nothing, row["response"],
        row["finish_reason"], row["adapter_version"],
    )  # fmt: skip


def _without_end(rollout: Rollout, end_ids: Sequence[int]) -> Rollout:
    """The response up to its end token; nothing a model samples after one is part of the response."""
    ends = np.flatnonzero(np.isin(rollout.response_ids, list(end_ids)))
    if not len(ends):
        return rollout
    end = ends[0]
    return replace(rollout, response_ids=rollout.response_ids[:end], logprobs=rollout.logprobs[:end])


def write_generations(path: Path, table: pa.Table) -> None:
    """Write the table as Parquet; a killed writer leaves the old file, never half of a new one."""
    unfinished = path.with_name(path.name + ".tmp")
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.replace(path)


def read_generations(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The table that `write_generations` wrote, or some of its columns.

    Raises:
        DataError: there is no such file, it is not Parquet, or a column is missing.
    """
    try:
        present = pq.read_schema(path).names
        if missing := [name for name in columns or SCHEMA.names if name not in present]:
            raise DataError(f"{path} lacks the columns {', '.join(missing)}: evaluate the run again")
        return pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: evaluate the run first") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {first_line(error)}") from error
