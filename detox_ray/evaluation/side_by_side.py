"""Evaluations that were made one by one, side by side in one: no model is needed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detox_ray.errors import DataError
from detox_ray.evaluation.comparison import EvaluationProtocol, compare, write_evaluation
from detox_ray.evaluation.evaluation_file import read_evaluation
from detox_ray.evaluation.responses import WORDS, ScoredResponses, align, read_generations, systems_of
from detox_ray.metrics_file import GENERATIONS_FILE


def compare_folders(folders: Sequence[Path], output: Path, resamples: int = 2000) -> dict[str, Any]:
    """Put the systems of several evaluation folders side by side in a new one, against the first folder's reference.

    The reference of every other folder is left out, for it is the same model; a system whose name is taken gets its
    folder's before it. Returns the content of the new evaluation.json.

    Raises:
        DataError: a folder holds no evaluation or is named twice, the prompts or their numbers of responses differ, no
            scorer is common to all, or perplexities, relevances or the sampling differ.
    """
    if repeated := [f for f in folders if sum(f.resolve() == other.resolve() for other in folders) > 1]:
        raise DataError(f"{repeated[0]} is named twice: name different folders")
    evaluations = [read_evaluation(folder) for folder in folders]
    first = evaluations[0]
    scorers = [s for s in first["scorers"] if all(s in other["scorers"] for other in evaluations)]
    if first["judge"] not in scorers:
        raise DataError(
            f"{folders[0]} was judged by {first['judge']!r}, which did not score all the others; "
            "evaluate them with the same scorers"
        )
    _require_equal(folders, evaluations, "perplexity_model")
    _require_equal(folders, evaluations, "relevance_model")
    _require_equal(folders, evaluations, "sampling")
    systems: list[ScoredResponses] = []
    for folder, evaluation in zip(folders, evaluations, strict=True):
        for system in systems_of(read_generations(folder / GENERATIONS_FILE)):
            if systems and system.name == evaluation["reference"]:
                continue
            systems.append(_restricted(system, scorers, _free_name(system.name, folder, systems)))
    if len(systems) < 2:
        raise DataError(f"{folders[0]} holds one system, and there is nothing to compare it with: name more folders")
    # `systems_of` brings the prompts of every folder into one order, so that the scores fit as they are.
    aligned = align([system.responses for system in systems])
    systems = [replace(system, responses=responses) for system, responses in zip(systems, aligned, strict=True)]
    units = {other.get("counted_in") for other in evaluations}
    counted_in = units.pop() if len(units) == 1 else WORDS
    read_by = first["perplexity_model"], first["relevance_model"]
    protocol = EvaluationProtocol(scorers, first["seed"], resamples, *read_by, counted_in)
    evaluation = compare(systems, protocol)
    if sampled := [other["sampling"] for other in evaluations if "sampling" in other]:
        evaluation["sampling"] = sampled[0]
    write_evaluation(output, evaluation, systems)
    return evaluation


def _require_equal(folders: Sequence[Path], evaluations: Sequence[Mapping[str, Any]], key: str) -> None:
    """Raises:
    DataError: two folders that have the key differ in it.
    """
    found = [(folder, e[key]) for folder, e in zip(folders, evaluations, strict=True) if key in e]
    for folder, value in found[1:]:
        if value != found[0][1]:
            raise DataError(
                f"{key} is {found[0][1]!r} in {found[0][0]} and {value!r} in {folder}; evaluate them with the same"
            )


def _restricted(system: ScoredResponses, scorers: Sequence[str], name: str) -> ScoredResponses:
    """The system under a name, with these scorers alone."""
    toxicity = {scorer: system.toxicity[scorer] for scorer in scorers}
    return replace(system, toxicity=toxicity, responses=replace(system.responses, name=name))


def _free_name(name: str, folder: Path, systems: Sequence[ScoredResponses]) -> str:
    """The name, with the folder's before it when it is taken.

    Raises:
        DataError: that is taken too.
    """
    taken = {system.name for system in systems}
    candidates = [name, f"{folder.resolve().name} {name}"]
    free = next((candidate for candidate in candidates if candidate not in taken), None)
    if free is None:
        raise DataError(f"two folders are called {folder.resolve().name!r}: rename one of them")
    return free
