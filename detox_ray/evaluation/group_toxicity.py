"""How toxic a policy answers prompts that mention a group, by system and group, from its generations."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from detox_ray.errors import DataError
from detox_ray.evaluation.metrics import TOXIC_THRESHOLD, Interval, intervals, ratio_of_sums

NO_GROUP = "(no group)"
_COLUMNS = ("system", "prompt_id", "group", "toxicity")


@dataclass(frozen=True)
class GroupToxicity:
    """The responses of a system to the prompts that mention a group; intervals are by bootstrap over prompts."""

    system: str
    group: str
    prompts: int
    responses: int
    mean_toxicity: Interval
    share_toxic: Interval


@dataclass(frozen=True)
class PolicyAudit:
    """Every system by group, `NO_GROUP` last; `left_out` counts responses without a judgement."""

    rows: list[GroupToxicity]
    left_out: dict[str, int]


def audit_generations(table: pa.Table, resamples: int = 2000, seed: int = 0) -> PolicyAudit:
    """Toxicity by the judge of the responses to prompts that mention each group, by system.

    `table`: the columns system, prompt_id, group (null: mentions none) and toxicity of generations.parquet.

    Raises:
        DataError: a column is missing, or no prompt mentions a group.
    """
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise DataError(f"the generations lack the columns {', '.join(missing)}: evaluate the run again")
    frame = table.select(_COLUMNS).to_pandas()
    unjudged = frame["toxicity"].isna()
    frame = frame[~unjudged]
    if not frame["group"].notna().any():
        raise DataError("the generations name no group: evaluate prompts whose column `group` says whom they mention")
    frame = frame.assign(group=frame["group"].fillna(NO_GROUP), toxic=frame["toxicity"] >= TOXIC_THRESHOLD)
    # By the first row of a system, but the groups by name: the same order in every system's part.
    systems = list(dict.fromkeys(frame["system"]))
    groups = group_order(frame["group"])
    rows = [
        _group_toxicity(system, group, part, resamples, seed)
        for system in systems
        for group in groups
        if len(part := frame[(frame["system"] == system) & (frame["group"] == group)])
    ]
    return PolicyAudit(rows, {"response without a toxicity": int(unjudged.sum())} if unjudged.any() else {})


def group_order(groups: Iterable[str]) -> list[str]:
    """The different groups by name, `NO_GROUP` last."""
    return sorted({str(group) for group in groups}, key=lambda group: (group == NO_GROUP, group))


def _group_toxicity(system: str, group: str, part: pd.DataFrame, resamples: int, seed: int) -> GroupToxicity:
    by_prompt = part.groupby("prompt_id", sort=True)
    responses = by_prompt.size().to_numpy()
    sums = {name: by_prompt[name].sum().to_numpy(dtype=np.float64) for name in ("toxicity", "toxic")}
    found = intervals({name: ratio_of_sums(values, responses) for name, values in sums.items()}, resamples, seed)
    return GroupToxicity(system, group, len(responses), len(part), found["toxicity"], found["toxic"])
