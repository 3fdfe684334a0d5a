"""Score a big file on Ray Data: constant memory, every worker busy, and a killed scoring continues where it stopped.

One reader cuts the file into parts, which depend on the file alone; actors with the classifiers loaded score a part at
a time and write it to a file of its own. Parts whose file is there already are passed over.
"""

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa

from detox_ray.classifier_config import ClassifierConfig, make_classifier_absolute
from detox_ray.cluster import ray_session
from detox_ray.config import RayConfig
from detox_ray.config_section import is_fraction_above_one
from detox_ray.data.tables import FileSurvey, left_out_text, read_tables, require_columns, survey
from detox_ray.errors import ConfigError, DataError, DetoxError, RewardError, last_line
from detox_ray.evaluation.responses import SCORE_PREFIX
from detox_ray.metrics_file import write_atomically
from detox_ray.placement import Capacity
from detox_ray.rewards.classifiers import check_classifier
from detox_ray.rewards.revision import model_revision
from detox_ray.run_folder import CLASSIFIER_MAY_CHANGE
from detox_ray.scoring.folder import SUMMARY_FILE, ScoredFolder
from detox_ray.scoring.part_scorer import DISAGREEMENT, PartScorer
from detox_ray.scoring.summary import summarize, summary_table
from detox_ray.terminal import Terminal

FORMAT = 1
# A part is so many chunks of rows, and fewer when they are long: what a worker holds at a time, and what a kill costs.
# Texts of similar length are scored together within a part: 256 rows cost a tenth of the speed of 1,024.
CHUNK_ROWS = 512
MAX_PART_CHUNKS = 8
PART_BYTES = 32 * 2**20
# Parts of a small file: enough of them that the last ones keep all workers busy.
PARTS_WANTED = 32
# What may wait between the reader and the workers, in the object store.
QUEUE_BYTES = 128 * 2**20
WORKER_CPUS = 1
WORKER_DEATHS = 3  # the third within one command ends it


def score_file(
    path: str | Path,
    output: str | Path,
    classifiers: Sequence[ClassifierConfig],
    text_column: str = "text",
    workers: int | None = None,
    ray: RayConfig | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score every text of a JSONL, CSV, TSV or Parquet file with every classifier.

    `output` becomes a folder of Parquet files: all rows and columns of the file in their order, with a column
    `toxicity/<name>` a classifier and `disagreement`, the standard deviation over them. A row whose text is null has
    null scores; lines that are no rows are left out. Both are counted. The same call continues a scoring that was
    stopped.

    Args:
        path: of the file; on a cluster, where every node sees it, as `output`.
        output: folder; new, empty, or of the same scoring.
        classifiers: their `num_gpus` together are what one worker is given.
        text_column: column with the text; a field of a nested object is `object.field`.
        workers: processes, each with all classifiers and one CPU; none: one a CPU.
        ray: which Ray; none: a local one.
        quiet: print nothing.

    Returns:
        `{"rows", "left_out", "noted", "scorers": {name: {"scored", "mean_toxicity", "share_toxic"}}, "rows_per_s"}`,
        where `rows_per_s` is of this call alone, from the start of the first part to the end of the last: without the
        time to start Ray and to load the classifiers. It is None when nothing was left to score.

    Raises:
        ConfigError: the folder holds something else, a classifier does not fit, or there are too few CPUs.
        DataError: the file or its column is missing or malformed.
        ModelError, RewardError: a classifier cannot be loaded, or failed.
    """
    terminal, ray = Terminal(quiet), ray or RayConfig()
    path, folder = Path(path).expanduser().resolve(), ScoredFolder(Path(output).expanduser().resolve())
    classifiers = _checked(classifiers)
    terminal.stage(f"reading {path.name}")
    file = survey(path)
    _check_columns(path, file, text_column, classifiers)
    job = _Job(path, file, text_column, classifiers, folder)
    with folder.opened(job.identity):
        done = sum(part.rows for part in folder.finished().values())
        terminal.stage(f"{file.rows:,} rows{left_out_text(file.left_out)}{f', {done:,} scored before' if done else ''}")
        rows_per_s = None
        if done < file.rows:
            rows_per_s = _score_parts(job, workers, ray, terminal)
        summary = summarize(folder.finished())
        summary["left_out"] = file.left_out | summary["left_out"]
        write_atomically(folder.path / SUMMARY_FILE, json.dumps(summary, indent=2))
    summary["rows_per_s"] = rows_per_s
    terminal.console.print(summary_table(summary))
    terminal.stage(f"scores: {folder.path}")
    return summary


def parts(path: Path, file: FileSurvey) -> Iterator[tuple[int, pa.Table]]:
    """(number, rows) of every part; what is in which depends on the file alone."""
    chunks_wanted = min(MAX_PART_CHUNKS, max(1, file.rows // (PARTS_WANTED * CHUNK_ROWS)))
    number, waiting, size = 0, list[pa.Table](), 0
    for table in read_tables(path, file.schema, CHUNK_ROWS):
        waiting.append(table)
        size += table.nbytes
        if len(waiting) == chunks_wanted or size >= PART_BYTES:
            yield number, pa.concat_tables(waiting)
            number, waiting, size = number + 1, [], 0
    if waiting:
        yield number, pa.concat_tables(waiting)


@dataclass(frozen=True)
class _Job:
    """What is scored, by what, into what."""

    path: Path
    file: FileSurvey
    text_column: str
    classifiers: list[ClassifierConfig]
    folder: ScoredFolder

    @property
    def gpus(self) -> float:
        """Ray GPUs of one worker."""
        return sum(classifier.num_gpus for classifier in self.classifiers)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a scoring to be continued."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        placement = {*CLASSIFIER_MAY_CHANGE}
        exclude = dict.fromkeys(placement, True) | {"perspective": placement}
        scorers = {
            f"scorer {c.name}": {"model": model_revision(c), "settings": c.model_dump(mode="json", exclude=exclude)}
            for c in self.classifiers
        }
        names = [c.name for c in self.classifiers]
        return {"format": FORMAT, "file sha256": digest, "text column": self.text_column, "scorers": names} | scorers


def _score_parts(job: _Job, workers: int | None, config: RayConfig, terminal: Terminal) -> float:
    """Score the parts that are not there yet, and show how far it is; begin again when a worker dies.

    Returns:
        Rows per second, since the last beginning.
    """
    logs = job.folder.path / ".ray-logs"
    with ray_session(config, partial(_check_room, workers or 1, job.gpus), logs):
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        workers = workers or _room(job.gpus, ray.cluster_resources())
        terminal.stage(f"scoring with {', '.join(c.name for c in job.classifiers)} on {workers} workers")
        with terminal.bar("scoring", job.file.rows) as progress:
            deaths = 0
            while True:
                try:
                    return _run_dataset(job, workers, progress)
                except RayTaskError as error:
                    if not isinstance(error.cause, DetoxError):
                        raise
                    # Ours are one line; Ray appends what it has to say about retries.
                    raise type(error.cause)(str(error.cause).partition("\n")[0]) from None
                except RayActorError as error:
                    deaths += 1
                    if deaths == WORKER_DEATHS:
                        raise RewardError(
                            f"{deaths} scoring workers died: {last_line(error)}. With fewer workers there is "
                            "more memory for each; the same command continues"
                        ) from None


def _run_dataset(job: _Job, workers: int, progress: Callable[[float], None]) -> float:
    """Read and score on Ray Data until every part is there; raises what Ray raises.

    Returns:
        Rows per second, from the start of the first part to the end of the last.
    """
    import ray
    from ray.data import DataContext, ExecutionResources
    from ray.util.annotations import RayDeprecationWarning

    # Ray Data's own lines stay in the log folder of its session.
    logger = logging.getLogger("ray.data")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, logging.StreamHandler)]
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    # A block is a row that holds a whole part: what the reader yields, a worker gets.
    context.target_max_block_size = 1
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=QUEUE_BYTES)
    finished = job.folder.finished()
    done = sum(part.rows for part in finished.values())
    names: list[str] = []

    def options() -> dict[str, Any]:
        names.append(f"scorer-{uuid4().hex}")
        # Ray would start a worker that dies again for ever, also over a text that kills it.
        return {"name": names[-1], "max_restarts": 0}

    with DataContext.current(context), warnings.catch_warnings():
        # Of `ray_remote_args_fn`, which the Ray this project pins still has.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        scored = (
            ray.data.from_items([str(job.path)])
            # num_cpus is unlike that of the workers, or Ray would make one step of both.
            .map_batches(partial(_read_parts, file=job.file, finished=set(finished)), num_cpus=0)
            .map_batches(
                PartScorer,
                batch_format="pyarrow",
                fn_constructor_args=(str(job.path), str(job.folder.path), job.text_column, job.classifiers),
                concurrency=workers,
                num_cpus=WORKER_CPUS,
                num_gpus=job.gpus or None,
                ray_remote_args_fn=options,
            )
        )
        progress(done)
        rows, started, ended = 0, math.inf, 0.0
        try:
            for part in scored.iter_rows():
                rows += part["rows"]
                started, ended = min(started, part["started"]), max(ended, part["ended"])
                progress(done + rows)
        finally:
            # Where one fails, Ray Data's error would keep the workers alive, and their CPUs taken, as long as it lives.
            for name in names:
                with suppress(ValueError):
                    ray.kill(ray.get_actor(name))
    return rows / (ended - started)


def _read_parts(batch: dict[str, np.ndarray], file: FileSurvey, finished: set[int]) -> Iterator[pa.Table]:
    """The parts that are not finished, each a row of its number and its rows as an Arrow stream."""
    for path in batch["item"]:
        for number, table in parts(Path(path), file):
            if number not in finished:
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                stream = pa.array([sink.getvalue().to_pybytes()], pa.large_binary())
                yield pa.table({"part": pa.array([number]), "rows": stream})


def _checked(classifiers: Sequence[ClassifierConfig]) -> list[ClassifierConfig]:
    """The classifiers with the paths of their models absolute, for other processes.

    Raises:
        ConfigError, ModelError: there is none, two have one name, one cannot be loaded, or Ray does not give out as
            many GPUs as they need together.
    """
    names = [classifier.name for classifier in classifiers]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"classifiers {names}: give one or more, each with its own name")
    for classifier in classifiers:
        check_classifier(classifier)
    if is_fraction_above_one(gpus := sum(classifier.num_gpus for classifier in classifiers)):
        raise ConfigError(
            f"the num_gpus of the classifiers are {gpus:g} together, and above 1 Ray takes whole numbers only; a "
            "worker has all classifiers: change one of them"
        )
    trees = [classifier.model_dump() for classifier in classifiers]
    for tree in trees:
        make_classifier_absolute(tree)
    return [ClassifierConfig.model_validate(tree) for tree in trees]


def _check_columns(path: Path, file: FileSurvey, text_column: str, classifiers: list[ClassifierConfig]) -> None:
    """Raises:
    DataError: the text column is missing or no text, or a column of the result is there already.
    """
    require_columns(path, [text_column], file.schema.names)
    kind = file.schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{path}: column {text_column!r} holds {kind}, not text; name a column with text")
    for name in [*(SCORE_PREFIX + c.name for c in classifiers), DISAGREEMENT]:
        if name in file.schema.names:
            raise DataError(f"{path} has a column {name!r} already; rename it, or the classifier")


def _room(gpus: float, available: dict[str, float]) -> int:
    """How many workers Ray has CPUs and GPUs for."""
    room = available["CPU"] / WORKER_CPUS
    return max(1, int(min(room, available.get("GPU", 0) / gpus) if gpus else room))


def _check_room(workers: int, gpus: float, capacity: Capacity) -> None:
    """Raises:
    ConfigError: there are fewer CPUs or GPUs than the workers need, which would wait for them for ever.
    """
    for kind, needed in (("CPU", workers * WORKER_CPUS), ("GPU", workers * gpus)):
        if needed > capacity.total(kind) + 1e-6:
            there_are = f"{capacity.total(kind):g}"
            raise ConfigError(
                f"{workers} scoring workers need {needed:g} {kind}s and Ray has {there_are}; lower workers"
            )
