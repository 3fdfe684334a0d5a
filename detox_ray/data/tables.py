"""Rows of a file of any size, in one pass and little memory: CSV, TSV, JSON lines or Parquet, bad lines counted.

A nested object `{"prompt": {"text": ...}}` becomes columns such as `prompt.text`; what is nested deeper, and lists, are
kept as JSON text, and so is a column of JSON lines whose values are of several kinds. The columns of a CSV are text.
"""

import csv
import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from detox_ray.errors import DataError, first_line

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
# A text beyond this length is cut: no classifier of ours reads that far, and one such text would stall the others.
MAX_CHARACTERS = 100_000
# A CSV field beyond this length is a quote that was never closed.
MAX_FIELD_CHARACTERS = 2**24
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
PARQUET_BUFFER_BYTES = 2**20
LARGEST_INT = 2**63 - 1
COLUMNS_LISTED = 30

Row = dict[str, Any]


class Tally:
    """Counts by reason, with the place of the first of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, place: str) -> None:
        """One more; `place` is such as "line 17"."""
        self._counts[reason] += 1
        self._first.setdefault(reason, place)

    def counts(self) -> dict[str, int]:
        """`{"not UTF-8 (first in line 17)": 3}`."""
        return {f"{reason} (first in {self._first[reason]})": count for reason, count in self._counts.items()}


@dataclass(frozen=True)
class FileSurvey:
    """What one pass over a file found: the columns of all rows, their number, and the lines that are no rows."""

    schema: pa.Schema
    rows: int
    left_out: dict[str, int]


def survey(path: Path) -> FileSurvey:
    """Read the file once, to know its columns, the number of its rows, and what is wrong with it.

    Raises:
        DataError: it is missing, empty, of no known kind, or malformed beyond single lines.
    """
    if _suffix(path) == ".parquet":
        with _open_parquet(path) as file:
            schema, rows = _flat(file.schema_arrow.empty_table()).schema, file.metadata.num_rows
        left_out: dict[str, int] = {}
    else:
        tally, kinds, rows = Tally(), dict[str, set[str]](), 0
        for _, row in read_rows(path, tally):
            rows += 1
            for name, value in row.items():
                kinds.setdefault(name, set()).add(_kind(value))
        schema = pa.schema([(name, _arrow_type(found - {"null"})) for name, found in kinds.items()])
        left_out = tally.counts()
    if not rows:
        raise DataError(f"{path} has no rows{left_out_text(left_out)}; give a file with one text per row")
    return FileSurvey(schema, rows, left_out)


def read_tables(path: Path, schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """The file, `rows` rows at a time (the last table has fewer), with the columns `survey` found.

    Raises:
        DataError: as `survey`.
    """
    if _suffix(path) == ".parquet":
        with _open_parquet(path) as file:
            yield from _rechunk(file, rows)
        return
    records = (row for _, row in read_rows(path, Tally()))
    while chunk := list(islice(records, rows)):
        yield _table(chunk, schema)


def read_rows(path: Path, tally: Tally) -> Iterator[tuple[str, Row]]:
    """(place, row) of every row, where place is such as "line 17"; what is no row is counted in `tally`.

    Raises:
        DataError: as `survey`, but for a file without rows.
    """
    match _suffix(path):
        case ".jsonl":
            yield from _json_rows(path, tally)
        case ".csv":
            yield from _csv_rows(path, ",", tally)
        case ".tsv":
            yield from _csv_rows(path, "\t", tally)
        case _:
            with _open_parquet(path) as file:
                number = 0
                for batch in file.iter_batches(batch_size=1024, use_threads=False):
                    for row in to_python(_flat(pa.Table.from_batches([batch])), path):
                        number += 1
                        yield f"row {number}", row


def to_python(data: pa.Table | pa.ChunkedArray, path: Path) -> list[Any]:
    """The rows of a table as dicts, or the values of a column.

    Raises:
        DataError: a column of text holds bytes that are not UTF-8.
    """
    try:
        return data.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a column of text is not UTF-8 ({error.reason}); repair it") from None


def require_columns(path: Path, wanted: Iterable[str], present: Sequence[str]) -> None:
    """Raises:
    DataError: a column is not there; the message names those that are, and the nearest.
    """
    missing = [name for name in wanted if name not in present]
    if not missing:
        return
    listed = ", ".join(present[:COLUMNS_LISTED]) + (", ..." if len(present) > COLUMNS_LISTED else "")
    nearest = difflib.get_close_matches(missing[0], present, n=1, cutoff=0.55)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "name one of them"
    names = ", ".join(repr(name) for name in missing)
    raise DataError(f"{path} has no column {names}; its columns are {listed}: {hint}")


def is_null(value: Any) -> bool:
    """None, or the NaN that some writers put for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def left_out_text(counts: dict[str, int]) -> str:
    """ " (left out: 3 not UTF-8 (first in line 17))", or nothing."""
    return f" (left out: {', '.join(f'{count:,} {reason}' for reason, count in counts.items())})" if counts else ""


def _suffix(path: Path) -> str:
    """The kind of the file, which exists and can be read.

    Raises:
        DataError: it is not so.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or not path.exists():
        raise DataError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give a file")
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file {suffix!r}; give one of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if start in UTF16_MARKS:
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    return suffix


def _json_rows(path: Path, tally: Tally) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                tally.add("not UTF-8", place)
                continue
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                tally.add("not JSON", place)
                continue
            if not isinstance(row, dict):
                tally.add("not a JSON object", place)
            # An escape such as \ud800 makes half a character, which no UTF-8 can hold.
            elif "\\u" in text and not _is_utf8(json.dumps(row, ensure_ascii=False)):
                tally.add("not UTF-8", place)
            else:
                yield place, _flat_row(row)


def _csv_rows(path: Path, delimiter: str, tally: Tally) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    # Bytes that are not UTF-8 become surrogates, so that only the rows they stand in are lost.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = _header(next(reader, []), path)
            for row in reader:
                place = f"line {reader.line_num}"
                if not row:
                    continue
                if len(row) != len(names):
                    tally.add("wrong number of fields", place)
                elif not _is_utf8("".join(row)):
                    tally.add("not UTF-8", place)
                else:
                    yield place, dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: {error}; is a quote not closed? repair the line") from None


def _header(names: list[str], path: Path) -> list[str]:
    """Column names as pandas gives them: one without a name (a saved index) is `Unnamed: 0`.

    Raises:
        DataError: a name stands twice, or is not UTF-8.
    """
    names = [name or f"Unnamed: {i}" for i, name in enumerate(names)]
    if not _is_utf8("".join(names)):
        raise DataError(f"{path}: its first line, the names of the columns, is not UTF-8; save it as UTF-8")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path} has two columns {repeated[0]!r}; give each its own name")
    return names


def _flat_row(row: Row) -> Row:
    flat: Row = {}
    for name, value in row.items():
        flat |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _flat(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata(None).flatten()


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int():
            return "int" if abs(value) <= LARGEST_INT else "json"
        case float():
            return "float"
        case str():
            return "text"
    return "json"


def _arrow_type(kinds: set[str]) -> pa.DataType:
    """Of a column with values of these kinds; text stands for JSON where there are several."""
    if kinds and kinds <= {"int", "float"}:
        return pa.int64() if kinds == {"int"} else pa.float64()
    return pa.bool_() if kinds == {"bool"} else pa.string()


def _table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if pa.types.is_string(field.type):
            values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        columns.append(pa.array(values, type=field.type))
    return pa.table(columns, schema=schema)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {first_line(error)}; repair or convert it") from None


def _rechunk(file: pq.ParquetFile, rows: int) -> Iterator[pa.Table]:
    """Tables of exactly `rows` rows: the batches of a Parquet file may end with its row groups."""
    waiting: pa.Table | None = None
    for batch in file.iter_batches(batch_size=rows, use_threads=False):
        table = _flat(pa.Table.from_batches([batch]))
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while waiting.num_rows >= rows:
            yield waiting.slice(0, rows)
            waiting = waiting.slice(rows)
    if waiting is not None and waiting.num_rows:
        yield waiting


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
