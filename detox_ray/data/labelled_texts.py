"""Texts of a file with numbers about each: labels to calibrate with, scores of others to compare with.

Nothing is dropped in silence: rows that cannot be used, and numbers that are not there, are counted. No text and no
value that may be one is ever quoted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detox_ray.data.tables import MAX_CHARACTERS, Row, Tally, is_null, left_out_text, read_rows, require_columns
from detox_ray.errors import DataError

TRUTH_VALUES = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class LabelledTexts:
    """N texts in the order of the file.

    `numbers`: column -> `[N] float64` in [0, 1], NaN where a row has none. `rows` counts what the file holds,
    `left_out` the rows that are not among the N by reason, `missing` the NaN of each column.
    """

    texts: list[str]
    numbers: dict[str, np.ndarray]
    rows: int
    left_out: dict[str, int]
    missing: dict[str, int]


def read_labelled_texts(path: str | Path, text_column: str, number_columns: Sequence[str]) -> LabelledTexts:
    """The texts of a CSV, TSV, JSONL or Parquet file with the numbers of `number_columns`: 0 and 1, or probabilities.

    Left out are null and empty texts, and rows without any of the numbers; a field of a nested object is
    `object.field`.

    Raises:
        DataError: the file or a column is missing, a value is no number in [0, 1], or no row can be used.
    """
    path, left_out = Path(path), Tally()
    texts: list[str] = []
    found: list[list[float]] = []
    present: dict[str, None] = {}
    rows = 0
    for place, row in read_rows(path, left_out):
        rows += 1
        present |= dict.fromkeys(row)
        numbers = [_number(row.get(column), path, place, column) for column in number_columns]
        if reason := _unusable(row, text_column, numbers):
            left_out.add(reason, place)
            continue
        texts.append(row[text_column][:MAX_CHARACTERS])
        found.append(numbers)
    counts = left_out.counts()
    if not present:
        raise DataError(f"{path} has no rows{left_out_text(counts)}; give a file with one text per row")
    require_columns(path, [text_column, *number_columns], list(present))
    if not texts:
        raise DataError(f"{path}: no row can be used{left_out_text(counts)}; repair the file")
    columns = np.array(found).reshape(len(texts), -1).T
    by_column = dict(zip(number_columns, columns, strict=True))
    missing = {column: int(np.isnan(values).sum()) for column, values in by_column.items()}
    if empty := [column for column, count in missing.items() if count == len(texts)]:
        raise DataError(f"{path}: column {empty[0]!r} has no number in any of {len(texts):,} rows; name another")
    return LabelledTexts(texts, by_column, rows, counts, missing)


def _unusable(row: Row, text_column: str, numbers: list[float]) -> str | None:
    """Why a row is left out, if it is."""
    text = row.get(text_column)
    if is_null(text):
        return "null text"
    if not isinstance(text, str):
        return "text is not text"
    if not text.strip():
        return "empty text"
    return "no label and no score" if all(map(math.isnan, numbers)) else None


def _number(value: Any, path: Path, place: str, column: str) -> float:
    """The number in a cell, NaN when there is none."""
    if is_null(value) or value == "":
        return math.nan
    try:
        number = TRUTH_VALUES.get(str(value).strip().lower())
        number = float(value) if number is None else number
    except (TypeError, ValueError):
        raise DataError(
            f"{path} {place}: column {column!r} holds something that is no number; give 0 and 1, or probabilities"
        ) from None
    if not (0 <= number <= 1 or math.isnan(number)):
        raise DataError(
            f"{path} {place}: column {column!r} has {number:g}, which is not in [0, 1]; give 0 and 1, or probabilities"
        )
    return number
