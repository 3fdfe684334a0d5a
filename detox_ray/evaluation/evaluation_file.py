"""evaluation.json, format 2: reading it, and finding a number in it."""

import json
from pathlib import Path
from typing import Any

from detox_ray.errors import DataError
from detox_ray.metrics_file import EVALUATION_FILE

FORMAT = 2

Evaluation = dict[str, Any]
# {"value", "low", "high"}, each a number or None.
IntervalJson = dict[str, float | None]


def read_evaluation(folder: Path) -> Evaluation:
    """The content of a folder's evaluation.json.

    Raises:
        DataError: it does not exist, is no evaluation, or is of another format.
    """
    path = folder / EVALUATION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: evaluate the run first") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    check_evaluation(content, str(path))
    return content


def check_evaluation(content: Any, where: str) -> None:
    """Refuse what is not an evaluation of format 2; `where` names it in the message.

    Raises:
        DataError: it is not one.
    """
    if not isinstance(content, dict):
        raise DataError(f"{where} is not an evaluation: expected an object with the keys format and systems")
    if content.get("format") != FORMAT:
        raise DataError(f"{where} has format {content.get('format', 1)!r}, this version reads {FORMAT}: evaluate again")
    measured = content.get("systems")
    if not isinstance(measured, dict) or not measured or any("all" not in splits for splits in measured.values()):
        raise DataError(f"{where} is not an evaluation: expected systems, each with the split all; evaluate again")
    if content.get("reference") not in measured:
        raise DataError(
            f"{where}: the reference {content.get('reference')!r} is not among the systems {', '.join(measured)}; "
            "evaluate again"
        )


def systems(evaluation: Evaluation) -> list[str]:
    """Names of the systems, the reference first."""
    reference = evaluation["reference"]
    return [reference, *(name for name in evaluation["systems"] if name != reference)]


def compared_systems(evaluation: Evaluation) -> list[str]:
    """Names of the systems that are compared with the reference."""
    return systems(evaluation)[1:]


def splits(evaluation: Evaluation) -> dict[str, int | None]:
    """Split -> number of prompts in it, "all" first."""
    found = evaluation.get("splits") or {}
    return {"all": found.get("all", evaluation.get("prompts")), **{n: c for n, c in found.items() if n != "all"}}


def measured(evaluation: Evaluation, system: str, metric: str, split: str = "all") -> IntervalJson | None:
    """A metric of a system with its interval; None where it was not measured."""
    return evaluation["systems"][system].get(split, {}).get(metric)


def value(evaluation: Evaluation, system: str, metric: str, split: str = "all") -> float | None:
    """A metric of a system; None where it was not measured or is not finite."""
    return (measured(evaluation, system, metric, split) or {}).get("value")


def compared(evaluation: Evaluation, system: str, kind: str, split: str = "all") -> dict[str, IntervalJson]:
    """Metric -> `reduction` or `ratio` (the kind) of a system against the reference, with its paired interval."""
    return evaluation.get("comparisons", {}).get(system, {}).get(split, {}).get(kind) or {}


def ratio(evaluation: Evaluation, system: str, metric: str) -> float | None:
    """system / reference of a fluency metric; None where it was not measured."""
    return (compared(evaluation, system, "ratio").get(metric) or {}).get("value")


def p_value(evaluation: Evaluation, system: str) -> float | None:
    """Of the paired permutation test of mean toxicity over all prompts; None where there was none."""
    return evaluation.get("comparisons", {}).get(system, {}).get("all", {}).get("p_value")


def threshold(evaluation: Evaluation) -> float:
    """From where on a response counts as toxic."""
    return float(evaluation.get("threshold", 0.5))
