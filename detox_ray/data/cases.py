"""Labelled cases for an audit: texts that are known to be toxic or not, and the group each one mentions.

Nothing is dropped in silence: a row that cannot be used is left out and counted with its reason.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detox_ray.data.tables import MAX_CHARACTERS, Row, Tally, is_null, left_out_text, read_rows, require_columns
from detox_ray.errors import ConfigError, DataError

# More different values than this are no groups: the column holds names, numbers or texts.
MAX_VALUES = 200
_LABELS_LISTED = 10


@dataclass(frozen=True)
class CaseColumns:
    """Names of the columns, by default those of HateCheck (Röttger et al. 2021); `functionality` may be missing."""

    text: str = "test_case"
    label: str = "label_gold"
    group: str = "target_ident"
    functionality: str = "functionality"


@dataclass(frozen=True)
class CaseLabels:
    """What the values of the label column mean; case and surrounding white space do not count."""

    toxic: Sequence[str] = ("hateful", "hate", "toxic", "offensive", "1", "true", "yes")
    nontoxic: Sequence[str] = (
        *("non-hateful", "nonhateful", "not hateful", "nothate", "non-toxic", "nontoxic", "not toxic"),
        *("neutral", "normal", "benign", "0", "false", "no"),
    )

    def meanings(self) -> dict[str, bool]:
        """Normalised label -> whether it means toxic.

        Raises:
            ConfigError: a label stands on both sides, or a side has none.
        """
        toxic, nontoxic = ({_normalized_label(label) for label in side} for side in (self.toxic, self.nontoxic))
        if not toxic or not nontoxic:
            raise ConfigError("labels: name at least one that means toxic and one that means not toxic")
        if both := toxic & nontoxic:
            raise ConfigError(f"label {min(both)!r} is named as toxic and as not toxic; leave it out on one side")
        return dict.fromkeys(toxic, True) | dict.fromkeys(nontoxic, False)


@dataclass(frozen=True)
class Cases:
    """N cases in the order of the file.

    `texts: [N]`; `toxic: [N] bool`; `groups: [N]`, None where a case mentions no group; `functionalities: [N]`, or None
    without such a column. `rows` counts what the file holds, `left_out` the rows that are no case by reason, `noted`
    those that are one but are worth a word.
    """

    texts: list[str]
    toxic: np.ndarray
    groups: list[str | None]
    functionalities: list[str] | None
    rows: int
    left_out: dict[str, int]
    noted: dict[str, int]


@dataclass(frozen=True)
class _Case:
    text: str
    toxic: bool
    group: str | None
    functionality: str


def read_cases(path: str | Path, columns: CaseColumns | None = None, labels: CaseLabels | None = None) -> Cases:
    """The cases in a CSV, TSV, JSONL or Parquet file.

    Left out are null and empty texts, null and unknown labels, rows that repeat text, group and functionality of
    another, and all rows of a text that has both labels for the same group.

    Raises:
        DataError: the file or a column is missing, no row can be used, or a column has too many values for groups.
        ConfigError: `labels` contradicts itself.
    """
    path, columns = Path(path), columns or CaseColumns()
    meanings = (labels or CaseLabels()).meanings()
    left_out, noted, unknown = Tally(), Tally(), Counter[str]()
    found: list[tuple[str, _Case]] = []
    present: dict[str, None] = {}
    rows = 0
    for place, row in read_rows(path, left_out):
        rows += 1
        present |= dict.fromkeys(row)
        case = _read_row(row, columns, meanings)
        if isinstance(case, str):
            left_out.add(case, place)
            if case == "unknown label":
                unknown[_normalized_label(row[columns.label])] += 1
            continue
        if len(row[columns.text]) > MAX_CHARACTERS:
            noted.add(f"text cut to {MAX_CHARACTERS:,} characters", place)
        found.append((place, case))
    if not present:
        raise DataError(f"{path} has no rows{left_out_text(left_out.counts())}; give a file with one case per row")
    require_columns(path, [columns.text, columns.label, columns.group], list(present))
    has_functionalities = columns.functionality in present
    cases = _unique(found, left_out)
    counts = left_out.counts()
    if not cases:
        fix = _labels_hint(columns, unknown, meanings) or "repair the file"
        raise DataError(f"{path}: no case is left{left_out_text(counts)}; {fix}")
    _check_values(path, columns.group, {case.group for case in cases})
    if has_functionalities:
        _check_values(path, columns.functionality, {case.functionality for case in cases})
    return Cases(
        texts=[case.text for case in cases],
        toxic=np.array([case.toxic for case in cases]),
        groups=[case.group for case in cases],
        functionalities=[case.functionality for case in cases] if has_functionalities else None,
        rows=rows,
        left_out=counts,
        noted=noted.counts(),
    )


def _read_row(row: Row, columns: CaseColumns, meanings: dict[str, bool]) -> _Case | str:
    """The case in a row, or why there is none."""
    text, label = row.get(columns.text), row.get(columns.label)
    if is_null(text):
        return "null text"
    if not isinstance(text, str):
        return "text is not text"
    if not text.strip():
        return "empty text"
    if is_null(label) or label == "":
        return "null label"
    toxic = meanings.get(_normalized_label(label))
    if toxic is None:
        return "unknown label"
    functionality = _name(row.get(columns.functionality)) or "(none)"
    return _Case(text[:MAX_CHARACTERS], toxic, _name(row.get(columns.group)), functionality)


def _unique(found: list[tuple[str, _Case]], left_out: Tally) -> list[_Case]:
    """The cases without repetitions, and without texts whose label contradicts itself."""
    meanings: dict[tuple[str, str | None], set[bool]] = {}
    for _, case in found:
        meanings.setdefault((case.text, case.group), set()).add(case.toxic)
    unique: dict[_Case, None] = {}
    for place, case in found:
        if len(meanings[case.text, case.group]) > 1:
            left_out.add("both labels for one text", place)
        elif case in unique:
            left_out.add("duplicate", place)
        else:
            unique[case] = None
    return list(unique)


def _normalized_label(label: Any) -> str:
    """`True` -> "true", `1.0` -> "1", " Hateful" -> "hateful"."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip().casefold()


def _name(value: Any) -> str | None:
    return None if is_null(value) else " ".join(str(value).split()) or None


def _labels_hint(columns: CaseColumns, unknown: Counter[str], meanings: dict[str, bool]) -> str:
    """What to do about unknown labels; a column with many values is not quoted, for it may hold texts."""
    if not unknown:
        return ""
    if len(unknown) > _LABELS_LISTED:
        return f"column {columns.label!r} has {len(unknown):,} different values: name the column with the labels"
    listed = ", ".join(repr(label[:20]) for label in sorted(unknown))
    known = ", ".join(sorted(meanings))
    fix = "say which of its labels mean what with --toxic-label and --nontoxic-label"
    return f"column {columns.label!r} has {listed}; known are {known}: {fix}"


def _check_values(path: Path, column: str, values: set[Any]) -> None:
    if len(values) > MAX_VALUES:
        raise DataError(
            f"{path}: column {column!r} has {len(values):,} different values, more than {MAX_VALUES}; "
            "name a column with a few groups of cases"
        )
