"""Records, as dicts, from the file, hub dataset or lab part that a configuration names."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detox_ray.config import DataConfig
from detox_ray.config_section import LAB_PREFIX
from detox_ray.data.lab import lab_source
from detox_ray.errors import DataError, first_line
from detox_ray.hub import why_not_loaded

Record = Mapping[str, Any]

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def read_records(config: DataConfig) -> list[Record]:
    """All records of `config.source`, at least one, each with the text column.

    Raises:
        DataError: the source is missing, empty or malformed, or lacks the text column.
        ConfigError: the source names no part of the lab.
    """
    source = str(lab_source(config.source)) if config.source.startswith(LAB_PREFIX) else config.source
    path = Path(source).expanduser()
    if path.is_file():
        records = _read_file(path, config.text_column)
    elif path.exists() or path.suffix in FILE_SUFFIXES or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"data.source = {source!r} {problem}; give a {', '.join(FILE_SUFFIXES)} file or a hub id")
    else:
        records = _read_hub(source, config.split, config.revision)
    if not records:
        raise DataError(f"data.source = {source!r} is empty; give a file with one prompt per line or row")
    for number, record in enumerate(records, 1):
        if config.text_column not in record:
            raise DataError(
                f"data.text_column = {config.text_column!r} is not in record {number} of {source}; its columns are "
                f"{', '.join(map(str, record))}: name one of them"
            )
    return records


def _read_file(path: Path, text_column: str) -> list[Record]:
    """Raises DataError when the file is malformed or of no known kind."""
    try:
        match path.suffix.lower():
            case ".jsonl":
                return _read_jsonl(path)
            case ".json":
                return _read_json(path)
            case ".csv" | ".tsv":
                with path.open(encoding="utf-8-sig", newline="") as file:
                    rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
                    return list(rows)
            case ".parquet":
                import pyarrow.parquet

                return pyarrow.parquet.read_table(path).to_pylist()
            case ".txt":
                with path.open(encoding="utf-8-sig") as file:
                    return [{text_column: line.removesuffix("\n")} for line in file]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (OSError, csv.Error, ValueError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix}: {first_line(error)}; repair or convert it") from None
    raise DataError(f"data.source = {str(path)!r}: unknown kind of file; give one of {', '.join(FILE_SUFFIXES)}")


def _read_jsonl(path: Path) -> list[Record]:
    records: list[Record] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number} is not JSON: {error.msg}; repair or remove the line") from None
            if not isinstance(record, dict):
                raise DataError(f"{path} line {number} is not a JSON object; expected {{column: value, ...}}")
            records.append(record)
    return records


def _read_json(path: Path) -> list[Record]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {error.lineno} is not JSON: {error.msg}; repair it, or name a file of JSON lines .jsonl"
        ) from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path} is not a JSON array of objects; expected [{{column: value, ...}}, ...]")
    return records


def _read_hub(name: str, split: str, revision: str | None) -> list[Record]:
    """Raises DataError when the dataset or the split cannot be had."""
    import datasets
    from huggingface_hub import snapshot_download

    try:
        # Offline, `datasets` would take whatever revision it has.
        source = name if revision is None else snapshot_download(name, repo_type="dataset", revision=revision)
        return datasets.load_dataset(source, split=split).to_list()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.source = {name!r} is no file here, and split {split!r} cannot be loaded from the hub: "
            f"{why_not_loaded(f'datasets/{name}', error)}"
        ) from None
