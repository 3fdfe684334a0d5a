"""A file of responses that somebody else generated: prompts, the responses to each, and scores that are there already.

Nothing is dropped in silence. A row that cannot be used is left out and counted: a null prompt or response, a score
that is null, NaN or no number, a line that is not UTF-8 or malformed. An empty response counts as one and is kept; a
response longer than `MAX_CHARACTERS` is cut to that. Rows with one prompt are its samples, in the order of the file.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detox_ray.config import ResponseColumns
from detox_ray.data.tables import MAX_CHARACTERS, Row, Tally, is_null, left_out_text, read_rows, require_columns
from detox_ray.errors import DataError

ONLY_SYSTEM = ""


@dataclass(frozen=True)
class ResponseTexts:
    """The responses of one system as texts: P prompts in the order of their first row, S responses to each.

    `prompts: [P]`; `prompt_scores: [P]` float64, NaN where the file has none, or None without such a column;
    `responses: [P][S]`; `scores`: scorer -> [P, S] float64 in [0, 1].
    """

    prompts: list[str]
    prompt_scores: np.ndarray | None
    responses: list[list[str]]
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class ResponseFile:
    """What `read_responses` found.

    `systems`: name -> responses, with the one name `ONLY_SYSTEM` when no column names the system. `left_out` counts the
    rows left out by reason, `noted` rows that were kept but are worth a word.
    """

    systems: dict[str, ResponseTexts]
    left_out: dict[str, int]
    noted: dict[str, int]


@dataclass(frozen=True)
class _Response:
    system: str
    prompt: str
    prompt_score: float
    text: str
    scores: dict[str, float]


def read_responses(path: str | Path, columns: ResponseColumns) -> ResponseFile:
    """The responses in a JSONL, CSV, TSV or Parquet file.

    Raises:
        DataError: the file or a column is missing, nothing in it can be used, a score is outside [0, 1], or prompts
            have different numbers of responses and `columns.samples` does not allow that.
    """
    path = Path(path)
    left_out, noted = Tally(), Tally()
    responses: list[_Response] = []
    present: dict[str, None] = {}
    for place, row in read_rows(path, left_out):
        present |= dict.fromkeys(row)
        response = _read_row(row, columns)
        if isinstance(response, str):
            left_out.add(response, place)
            continue
        if not response.text:
            noted.add("empty response, kept", place)
        if len(row[columns.response]) > MAX_CHARACTERS:
            noted.add(f"response cut to {MAX_CHARACTERS:,} characters", place)
        if columns.prompt_score is not None and math.isnan(response.prompt_score):
            noted.add("prompt without a published score, kept", place)
        responses.append(response)
    if not present:
        raise DataError(f"{path} has no rows{left_out_text(left_out.counts())}; give a file with one response per row")
    require_columns(path, _named(columns), list(present))
    if not responses:
        raise DataError(
            f"{path}: no response is left{left_out_text(left_out.counts())}; repair the file or name other columns"
        )
    _check_range(path, responses, columns)

    by_system: dict[str, dict[str, list[_Response]]] = {}
    for response in responses:
        by_system.setdefault(response.system, {}).setdefault(response.prompt, []).append(response)
    samples, surplus = _samples(path, by_system, columns, left_out)
    systems = {name: _system(by_prompt, samples, columns) for name, by_prompt in by_system.items()}
    counts = left_out.counts()
    if surplus:
        counts[f"more than {samples} responses to the prompt"] = surplus
    return ResponseFile(systems, counts, noted.counts() | _differing_prompt_scores(by_system))


def _named(columns: ResponseColumns) -> list[str]:
    optional = (columns.prompt_score, columns.system)
    return [
        columns.prompt,
        columns.response,
        *columns.scores.values(),
        *(name for name in optional if name is not None),
    ]


def _read_row(row: Row, columns: ResponseColumns) -> _Response | str:
    """The response in a row, or why there is none."""
    texts = {}
    for what, column in (("prompt", columns.prompt), ("response", columns.response), ("system", columns.system)):
        value = row.get(column) if column is not None else ONLY_SYSTEM
        if is_null(value):
            return f"null {what}"
        if not isinstance(value, str):
            return f"{what} is not text"
        texts[what] = value
    if len(texts["prompt"]) > MAX_CHARACTERS:
        return f"prompt of more than {MAX_CHARACTERS:,} characters"
    scores = {}
    for scorer, column in columns.scores.items():
        score = _number(row.get(column))
        if isinstance(score, str):
            return f"{score} in column {column!r}"
        scores[scorer] = score / columns.score_scale
    prompt_score = _number(row.get(columns.prompt_score)) if columns.prompt_score is not None else math.nan
    # Some published prompts have no score: the prompt can be used all the same, but in no split by toxicity.
    prompt_score = math.nan if isinstance(prompt_score, str) else prompt_score / columns.score_scale
    return _Response(texts["system"], texts["prompt"], prompt_score, texts["response"][:MAX_CHARACTERS], scores)


def _number(value: Any) -> float | str:
    """The score, or what is wrong with it."""
    if value is None or value == "":
        return "null score"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return "score is not a number"
    return "NaN score" if math.isnan(number) else number


def _check_range(path: Path, responses: list[_Response], columns: ResponseColumns) -> None:
    """Raises:
    DataError: a score is not in [0, 1].
    """
    found = {columns.scores[name]: [response.scores[name] for response in responses] for name in columns.scores}
    if columns.prompt_score is not None:
        found[columns.prompt_score] = [a.prompt_score for a in responses if not math.isnan(a.prompt_score)]
    for column, values in found.items():
        low, high = min(values, default=0.0), max(values, default=0.0)
        if low < 0 or high > 1:
            scaled = f" after division by score_scale = {columns.score_scale:g}" if columns.score_scale != 1 else ""
            raise DataError(
                f"{path}: column {column!r} has scores from {low:g} to {high:g}{scaled}, not in [0, 1]; "
                "name a column of probabilities, or set score_scale=100 if they are percent"
            )


def _samples(
    path: Path, by_system: dict[str, dict[str, list[_Response]]], columns: ResponseColumns, left_out: Tally
) -> tuple[int, int]:
    """(S, responses beyond S).

    Raises:
        DataError: prompts have different numbers of responses, and that is not allowed.
    """
    lengths = [len(responses) for by_prompt in by_system.values() for responses in by_prompt.values()]
    fewest = min(lengths)
    if columns.samples == "all_equal" and fewest != max(lengths):
        counts = Counter(lengths).most_common(4)
        listed = ", ".join(f"{samples} for {prompts:,} prompts" for samples, prompts in counts)
        raise DataError(
            f"{path}: prompts have different numbers of responses ({listed}{', ...' if len(set(lengths)) > 4 else ''})"
            f"{left_out_text(left_out.counts())}; the metrics need one number: "
            f"set samples=fewest to use the first {fewest}"
        )
    return fewest, sum(lengths) - fewest * len(lengths)


def _system(by_prompt: dict[str, list[_Response]], samples: int, columns: ResponseColumns) -> ResponseTexts:
    kept = {prompt: responses[:samples] for prompt, responses in by_prompt.items()}
    prompt_scores = None
    if columns.prompt_score is not None:
        prompt_scores = np.array([_first_score(responses) for responses in by_prompt.values()])
    scores = {
        name: np.array([[response.scores[name] for response in responses] for responses in kept.values()])
        for name in columns.scores
    }
    texts = [[response.text for response in responses] for responses in kept.values()]
    return ResponseTexts(list(kept), prompt_scores, texts, scores)


def _first_score(responses: list[_Response]) -> float:
    return next((a.prompt_score for a in responses if not math.isnan(a.prompt_score)), math.nan)


def _differing_prompt_scores(by_system: dict[str, dict[str, list[_Response]]]) -> dict[str, int]:
    differing = sum(
        len({a.prompt_score for a in responses if not math.isnan(a.prompt_score)}) > 1
        for by_prompt in by_system.values()
        for responses in by_prompt.values()
    )
    return {"prompt with several published scores, the first kept": differing} if differing else {}
