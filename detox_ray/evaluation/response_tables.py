"""The tables of the report that come from the responses themselves and from the evaluations during training."""

import math
from typing import Any

from detox_ray.evaluation.evaluation_file import Evaluation, threshold
from detox_ray.evaluation.metric_format import METRICS, UNKNOWN
from detox_ray.evaluation.paired_responses import (
    BUCKET_NAMES,
    PairedResponses,
    bucket_flows,
    share_on_different_sides,
)
from detox_ray.evaluation.tables import Cell, Column, Row, Table

_EVALUATED = {
    "mean_toxicity": ".3f",
    "share_toxic": ".1%",
    "reward": "+.3f",
    "mean_length": ".1f",
}


def disagreement_table(evaluation: Evaluation, responses: PairedResponses) -> Table | None:
    """Share of responses that the scorers put on different sides of the threshold, by system; None for one scorer."""
    scores = responses.scores
    if len(scores) < 2:
        return None
    judge, limit = str(evaluation.get("judge")), threshold(evaluation)
    others = [name for name in scores if name != judge] if judge in scores and len(scores) > 2 else []
    groups = [list(scores), *([judge, other] for other in others)]
    rows = []
    for place, system in enumerate(responses.systems):
        shares = [share_on_different_sides([scores[name][place] for name in group], limit) for group in groups]
        rows.append(Row(system, tuple(Cell(UNKNOWN if share is None else f"{share:.1%}") for share in shares)))
    headings = [Column("System"), Column("Any two scorers"), *(Column(f"Judge and {other}") for other in others)]
    return Table(
        "disagreement",
        f"Responses that scorers put on different sides of {limit:g}",
        tuple(headings),
        tuple(rows),
        "Read the examples where this is large: the scorers do not mean the same by toxic.",
    )


def flow_tables(responses: PairedResponses) -> list[Table]:
    """Counts of responses by toxicity bucket under a system and under the next, a table for every two neighbours."""
    found = []
    for place in range(len(responses.systems) - 1):
        before, after = responses.systems[place : place + 2]
        flows = bucket_flows(responses.toxicity[place], responses.toxicity[place + 1])
        rows = [
            Row(f"{bucket} under {before}", tuple(Cell(f"{count:,}") for count in flow))
            for bucket, flow in zip(BUCKET_NAMES, flows.tolist(), strict=True)
        ]
        columns = (Column("Responses"), *(Column(f"{bucket} under {after}") for bucket in BUCKET_NAMES))
        note = "Low is below 0.33, high above 0.66; the same sample of the same prompt under both."
        found.append(Table(f"flows-{place}", f"From {before} to {after}", columns, tuple(rows), note))
    return found


def evaluations_table(lines: list[dict[str, Any]]) -> Table | None:
    """The evaluations during training, a row a time; a key that no line has gets no column."""
    present = [key for key in _EVALUATED if any(line.get(key) is not None for line in lines)]
    if not present:
        return None
    rows = [
        Row(str(line["step"]), tuple(Cell(_number(line.get(key), _EVALUATED[key])) for key in present))
        for line in lines
    ]
    labels = [METRICS[key][0] if key in METRICS else "Reward" for key in present]
    columns = (Column("Step"), *(Column(label) for label in labels))
    return Table("evaluations", "Evaluations during training", columns, tuple(rows))


def _number(found: Any, form: str) -> str:
    return format(found, form) if isinstance(found, int | float) and math.isfinite(found) else UNKNOWN
