"""The responses of several systems to the same prompts, one beside the other, from generations.parquet."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from detox_ray.errors import DataError
from detox_ray.evaluation.metrics import BUCKETS
from detox_ray.evaluation.responses import SCORE_PREFIX, read_generations

BUCKET_NAMES = ("low", "medium", "high")


@dataclass(frozen=True)
class PairedResponses:
    """N responses of each of K systems; response n of every system is the same sample of the same prompt.

    `prompt_ids: [N]`, sorted, so that a prompt's responses are neighbours; `toxicity: [K, N]` by the judge and `scores`
    {scorer: [K, N]}, NaN where there is no score; `reward: [K, N]`, of the file or 1 - toxicity; `prompts: [N]` and
    `responses: [K][N]`, texts.
    """

    systems: list[str]
    prompt_ids: np.ndarray
    toxicity: np.ndarray
    scores: dict[str, np.ndarray]
    reward: np.ndarray
    prompts: pa.ChunkedArray
    responses: list[pa.ChunkedArray]

    def place(self, system: str) -> int:
        """The system's row in the arrays."""
        return self.systems.index(system)

    def prompt_bounds(self) -> list[tuple[int, int]]:
        """First and one after the last response of each prompt."""
        starts = np.flatnonzero(np.append(True, self.prompt_ids[1:] != self.prompt_ids[:-1]))
        return list(zip(starts.tolist(), [*starts[1:].tolist(), len(self.prompt_ids)], strict=True))


def read_paired_responses(path: Path, systems: list[str]) -> PairedResponses:
    """The responses of the named systems.

    Raises:
        DataError: the file is missing or unreadable, lacks a system, or the systems answered different prompts.
    """
    table = read_generations(path)
    order = [("prompt_id", "ascending"), ("sample", "ascending")]
    parts = [table.filter(pc.equal(table.column("system"), name)).sort_by(order) for name in systems]
    for name, part in zip(systems, parts, strict=True):
        if not part.num_rows:
            raise DataError(f"{path} holds no responses of {name!r}: evaluate the run again")
        if any(part.column(key) != parts[0].column(key) for key in ("prompt_id", "sample")):
            raise DataError(
                f"{path} does not hold the responses of {systems[0]!r} and {name!r} to the same prompts: "
                "evaluate the run again"
            )
    toxicity = np.stack([_numbers(part, "toxicity") for part in parts])
    scorers = [name.removeprefix(SCORE_PREFIX) for name in table.column_names if name.startswith(SCORE_PREFIX)]
    return PairedResponses(
        systems=systems,
        prompt_ids=np.array(parts[0].column("prompt_id").to_pylist()),
        toxicity=toxicity,
        scores={name: np.stack([_numbers(part, SCORE_PREFIX + name) for part in parts]) for name in scorers},
        reward=np.stack([_numbers(part, "reward") for part in parts])
        if "reward" in table.column_names
        else 1 - toxicity,
        prompts=parts[0].column("prompt"),
        responses=[part.column("response") for part in parts],
    )


def bucket_flows(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Responses that moved from one toxicity bucket to another: `[3, 3]`, from by to, low, medium, high.

    `before`, `after`: `[N]`; a pair with a NaN is not counted.
    """
    known = ~(np.isnan(before) | np.isnan(after))
    flows = np.zeros((3, 3), dtype=np.int64)
    np.add.at(flows, (_bucket(before[known]), _bucket(after[known])), 1)
    return flows


def share_on_different_sides(scores: list[np.ndarray], threshold: float) -> float | None:
    """Share of responses that some scorers put at or above the threshold and some below; None where none is known.

    `scores`: one array `[N]` per scorer; a response that a scorer gave no score is not counted.
    """
    stacked = np.stack(scores)
    known = stacked[:, ~np.isnan(stacked).any(axis=0)]
    if not known.shape[1]:
        return None
    toxic = known >= threshold
    return float(np.mean(toxic.any(axis=0) & ~toxic.all(axis=0)))


def _bucket(toxicity: np.ndarray) -> np.ndarray:
    low, high = BUCKETS
    return (toxicity >= low).astype(np.int64) + (toxicity > high)


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    return table.column(column).to_numpy().astype(np.float64)
