"""The folder a file is scored into: one Parquet file per part, and what is being scored by what."""

import fcntl
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from detox_ray.errors import ConfigError
from detox_ray.metrics_file import write_atomically

# Names that begin with an underscore or a dot are no data to whatever reads a folder of Parquet files.
JOB_FILE = "_scoring.json"
SUMMARY_FILE = "_summary.json"
SCRATCH_PREFIX = ".writing-"
STATISTICS_KEY = b"detox_ray"


@dataclass(frozen=True)
class PartStatistics:
    """Of one part: rows, rows without a score and rows worth a word by reason, and (n, sum, n >= 0.5) by scorer."""

    rows: int
    left_out: dict[str, int]
    noted: dict[str, int]
    toxicity: dict[str, tuple[int, float, int]]


@dataclass(frozen=True)
class ScoredFolder:
    """The parts in a folder; part i is there whole or not at all."""

    path: Path

    @contextmanager
    def opened(self, job: dict[str, Any]) -> Iterator[None]:
        """Hold the folder, new or with some parts of the same job done.

        Raises:
            ConfigError: it holds something else, is in use, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ConfigError(f"output {self.path} cannot be written ({error.strerror}); choose another") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"output {self.path} is in use by another process; wait, or choose another") from None
            self._check_job(job)
            self.clear_scratch()
            yield
            self.clear_scratch()

    def part(self, number: int) -> Path:
        """Where part `number` is, or will be; sorted by name the parts are in the order of the file."""
        return self.path / f"part-{number:06d}.parquet"

    def write_part(self, number: int, table: pa.Table, statistics: PartStatistics) -> None:
        """Write a part; a killed writer leaves nothing but a hidden file."""
        scratch = self.path / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}"
        content = json.dumps(vars(statistics)).encode()
        pq.write_table(table.replace_schema_metadata({STATISTICS_KEY: content}), scratch, compression="zstd")
        scratch.replace(self.part(number))

    def finished(self) -> dict[int, PartStatistics]:
        """Part number -> statistics, of the parts that are there."""
        parts = {}
        for path in sorted(self.path.glob("part-*.parquet")):
            metadata = pq.read_schema(path).metadata
            parts[int(path.stem.removeprefix("part-"))] = PartStatistics(**json.loads(metadata[STATISTICS_KEY]))
        return parts

    def clear_scratch(self) -> None:
        """Remove what killed writers left; one that still writes fails, and its part is written by another."""
        for path in self.path.glob(f"{SCRATCH_PREFIX}*"):
            path.unlink(missing_ok=True)

    def _check_job(self, job: dict[str, Any]) -> None:
        path = self.path / JOB_FILE
        if not path.exists():
            others = [p.name for p in self.path.iterdir() if p.name != ".lock"]
            if others:
                raise ConfigError(f"output {self.path} holds other files ({min(others)}); give a new or empty folder")
            write_atomically(path, json.dumps(job, indent=2))
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, value in job.items():
            if found.get(key) != value:
                raise ConfigError(
                    f"output {self.path} is of another scoring: its {key} is {_short(found.get(key))}, "
                    f"not {_short(value)}; choose another folder, or remove it"
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
