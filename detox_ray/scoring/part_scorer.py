"""What a scoring worker does: the rows of one part in, the same rows with their toxicity in a Parquet file out."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.data.tables import MAX_CHARACTERS, to_python
from detox_ray.evaluation.metrics import TOXIC_THRESHOLD
from detox_ray.evaluation.responses import SCORE_PREFIX
from detox_ray.rewards.classifiers import Classifier, load_classifier
from detox_ray.scoring.folder import PartStatistics, ScoredFolder

DISAGREEMENT = "disagreement"


class PartScorer:
    """Scores parts with one set of loaded classifiers; Ray Data makes an actor of it.

    The classifiers are loaded with the first part, since an error in an actor's constructor reaches the driver as
    text only.
    """

    def __init__(self, source: str, output: str, text_column: str, classifiers: list[ClassifierConfig]) -> None:
        self._source = Path(source)
        self._folder = ScoredFolder(Path(output))
        self._text_column = text_column
        self._configs = classifiers
        self._classifiers: list[Classifier] = []

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`batch`: columns `part`, a number, and `rows`, the part's table as an Arrow stream.

        Returns:
            Columns `part`, `rows`, the number of rows written, and `started` and `ended`, in seconds since the epoch.

        Raises:
            ConfigError, ModelError: a classifier cannot be loaded.
            RewardError: one failed.
            DataError: a text is not UTF-8.
        """
        self._load()
        done: dict[str, list[float]] = {"part": [], "rows": [], "started": [], "ended": []}
        for number, stream in zip(batch["part"].to_pylist(), batch["rows"], strict=True):
            started = time.time()
            table = pa.ipc.open_stream(stream.as_buffer()).read_all()
            # A worker that outlived a killed command may have written it since the part was read.
            if not self._folder.part(number).exists():
                self._folder.write_part(number, *self._score(table))
            for key, value in zip(done, (number, table.num_rows, started, time.time()), strict=True):
                done[key].append(value)
        return pa.table(done)

    def _score(self, table: pa.Table) -> tuple[pa.Table, PartStatistics]:
        left_out: Counter[str] = Counter()
        noted: Counter[str] = Counter()
        texts: list[str] = []
        readable = np.zeros(table.num_rows, dtype=bool)
        for i, text in enumerate(to_python(table[self._text_column], self._source)):
            if text is None:
                left_out["null text"] += 1
                continue
            if not text:
                noted["empty text, scored"] += 1
            elif len(text) > MAX_CHARACTERS:
                noted[f"text scored on its first {MAX_CHARACTERS:,} characters"] += 1
            texts.append(text[:MAX_CHARACTERS])
            readable[i] = True
        scores: dict[str, np.ndarray] = {}
        for classifier in self._classifiers:
            found = classifier.read(texts)
            scores[classifier.name] = np.asarray(found.toxicity, dtype=np.float64)
            if long := int((found.windows > 1).sum()):
                noted[f"text read by {classifier.name} in several windows"] = long
        for name, values in scores.items():
            table = table.append_column(SCORE_PREFIX + name, _with_nulls(values, readable))
        spread = np.std(list(scores.values()), axis=0)
        table = table.append_column(DISAGREEMENT, _with_nulls(spread, readable))
        toxicity = {
            name: (len(values), float(values.sum()), int((values >= TOXIC_THRESHOLD).sum()))
            for name, values in scores.items()
        }
        return table, PartStatistics(table.num_rows, dict(left_out), dict(noted), toxicity)

    def _load(self) -> None:
        if self._classifiers:
            return
        if any(config.kind != "linear" for config in self._configs):
            import torch

            # One thread per actor: two beside another busy process are slower than one.
            torch.set_num_threads(1)
        self._classifiers = [
            load_classifier(config, device="cpu" if config.num_gpus == 0 else None) for config in self._configs
        ]


def _with_nulls(values: np.ndarray, readable: np.ndarray) -> pa.Array:
    """`values`, one a readable row, as a column of all rows; the others are null."""
    column = np.zeros(len(readable))
    column[readable] = values
    return pa.array(column, mask=~readable)
