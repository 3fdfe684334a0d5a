"""The responses of a system, what was measured of each, and the Parquet file that keeps both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from detox_ray.errors import DataError
from detox_ray.records import Rollout

SCHEMA = pa.schema(
    [
        pa.field("system", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("adapter_version", pa.int64(), nullable=False),
        pa.field("toxicity", pa.float64(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class SystemResponses:
    """What one system (a model, with or without an adapter) answered: P prompts, S responses to each.

    `prompt_ids: [P]`; `rollouts: [P][S]`.
    """

    name: str
    prompt_ids: list[str]
    rollouts: list[list[Rollout]]

    @property
    def samples_per_prompt(self) -> int:
        """S."""
        return len(self.rollouts[0])


@dataclass(frozen=True)
class ScoredResponses:
    """The responses of a system with what was measured of each.

    `token_ids: [P][S][tokens]` without end tokens; `toxicity: [P, S]` in [0, 1] by the judge; `nll: [P, S]` in nats,
    under the reference model and given the prompt.
    """

    responses: SystemResponses
    token_ids: list[list[list[int]]]
    toxicity: np.ndarray
    nll: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Number of tokens of each response, [P, S] int64."""
        return np.array([[len(ids) for ids in samples] for samples in self.token_ids], dtype=np.int64)


def group_rollouts(name: str, rollouts: Sequence[Rollout]) -> SystemResponses:
    """Rollouts in any order, gathered by prompt (prompts in order of first appearance).

    Raises:
        DataError: there are none, or prompts have different numbers of responses.
    """
    by_prompt: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    if not by_prompt:
        raise DataError(f"system {name!r} has no responses to measure")
    counts = {prompt_id: len(samples) for prompt_id, samples in by_prompt.items()}
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[fewest] != counts[most]:
        raise DataError(
            f"system {name!r}: prompt {fewest!r} has {counts[fewest]} responses, prompt {most!r} has {counts[most]}; "
            "the metrics need the same number for every prompt"
        )
    return SystemResponses(name, list(by_prompt), list(by_prompt.values()))


def align(base: SystemResponses, tuned: SystemResponses) -> SystemResponses:
    """`tuned` with its prompts in the order of `base`, so that prompt i is the same text in both.

    Raises:
        DataError: the systems answered different prompts, or different numbers of responses to each, or share a name.
    """
    ours, theirs = set(base.prompt_ids), set(tuned.prompt_ids)
    if ours != theirs:
        raise DataError(
            f"{base.name!r} and {tuned.name!r} answered different prompts ({len(ours - theirs)} only the first, "
            f"{len(theirs - ours)} only the second): a paired comparison needs the same prompts"
        )
    if base.samples_per_prompt != tuned.samples_per_prompt:
        raise DataError(
            f"{base.name!r} gives {base.samples_per_prompt} responses a prompt, "
            f"{tuned.name!r} gives {tuned.samples_per_prompt}: "
            "the maximum over a prompt's responses grows with their number, so give both the same"
        )
    if base.name == tuned.name:
        raise DataError(f"both systems are called {base.name!r}: give each its own name")
    position = {prompt_id: i for i, prompt_id in enumerate(tuned.prompt_ids)}
    return SystemResponses(tuned.name, base.prompt_ids, [tuned.rollouts[position[p]] for p in base.prompt_ids])


def generations_table(*systems: ScoredResponses) -> pa.Table:
    """One row a response, with the columns of `SCHEMA`: system by system, prompt by prompt."""
    rows = [
        {
            "system": system.responses.name,
            "prompt_id": rollout.prompt_id,
            "prompt": rollout.prompt_text,
            "sample": sample,
            "response": rollout.text,
            "response_ids": system.token_ids[prompt][sample],
            "finish_reason": rollout.finish_reason,
            "tokens": len(system.token_ids[prompt][sample]),
            "adapter_version": rollout.adapter_version,
            "toxicity": float(system.toxicity[prompt, sample]),
            "nll": float(system.nll[prompt, sample]),
        }
        for system in systems
        for prompt, samples in enumerate(system.responses.rollouts)
        for sample, rollout in enumerate(samples)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write_generations(path: Path, table: pa.Table) -> None:
    """Write the table as Parquet; a killed writer leaves the old file, never half of a new one."""
    unfinished = path.with_name(path.name + ".tmp")
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.replace(path)


def read_generations(path: Path) -> pa.Table:
    """The table that `write_generations` wrote.

    Raises:
        DataError: there is no such file, it is not Parquet, or a column is missing.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: evaluate the run first") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}: evaluate the run again")
    return table.select(SCHEMA.names)
