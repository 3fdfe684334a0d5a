"""Files of a run that outlive a kill: the metrics, a line per step, and whatever must be whole or absent."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"  # by the judge, while it trains
REJECTED_FILE = "rejected_steps.jsonl"  # why steps were rejected and what was done
FAILURE_FILE = "failure.json"
EVALUATION_FILE = "evaluation.json"  # what a run or an evaluation found, once it is complete
GENERATIONS_FILE = "generations.parquet"  # every response of it with its scores
FINE_TUNING_FILE = "fine_tuning.json"  # what became of a fine-tuning, once it is complete
LEARNED_FILE = "learned_prompts.txt"  # digests of what the adapter was trained on; see `data.learned`
DEV_PROMPTS_FILE = "dev_prompts.jsonl"  # the prompts of a fine-tuning's dev examples, as its model reads them
ADAPTER_FOLDER = "adapter"
CONFIG_FILE = "config.yaml"
CHECKPOINT_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"  # in a checkpoint's folder, written last
STEPS_FILE = "steps.txt"  # in the adapter's folder: how many steps it was trained for


def write_atomically(path: Path, text: str) -> None:
    """Replace the file whole: whoever reads it, also after a kill, finds the old content or the new."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    """Append one step's line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file up to the first that is no JSON, as a crash leaves one at the end."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def metrics_line(text: str) -> dict[str, Any] | None:
    """A line of a metrics file; None: it is damaged."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


class FollowedFile(Generic[T]):
    """The lines of a file that another process writes, each read once; `parse` makes something of a line, or None."""

    def __init__(self, path: Path, parse: Callable[[str], T | None]) -> None:
        self._path = path
        self._parse = parse
        self._file = 0  # its inode
        self._offset = 0
        self._found: list[T] = []

    def lines(self) -> list[T]:
        """What was made of all lines so far; a last one without an end waits for its rest.

        A file that has become shorter, or another one in its place, as `cut_metrics` leaves it, is read anew.
        """
        try:
            with self._path.open("rb") as file:
                now = os.fstat(file.fileno())
                if now.st_ino != self._file or now.st_size < self._offset:
                    self._file, self._offset, self._found = now.st_ino, 0, []
                file.seek(self._offset)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(whole + end)
        parsed = (self._parse(line) for line in whole.decode("utf-8", errors="replace").split("\n"))
        self._found += [line for line in parsed if line is not None] if end else []
        return list(self._found)


def cut_metrics(path: Path, first_step: int) -> None:
    """Drop the lines of steps that will be run again, so that no step stands in the file twice."""
    kept = [line for line in read_metrics(path) if line["step"] < first_step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
