"""A calibration, told in the order it happens: read labelled texts, score them, fit on one half, measure on the other.

Classifiers first: the map of an attribute or a category is fitted on what its classifiers, calibrated, make of a text.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.data.lab import resolve_lab
from detox_ray.data.labelled_texts import LabelledTexts, read_labelled_texts
from detox_ray.data.prompts import normalized
from detox_ray.errors import ConfigError, DataError
from detox_ray.evaluation.calibration_metrics import quality_change
from detox_ray.evaluation.calibration_report import CalibrationReport, write_calibration
from detox_ray.evaluation.calibration_tables import Agreed, Agreement, Fitted
from detox_ray.evaluation.comparison import installed_versions
from detox_ray.evaluation.metrics import TOXIC_THRESHOLD
from detox_ray.evaluation.rank_metrics import roc_auc, spearman
from detox_ray.metrics_file import write_atomically
from detox_ray.records import Readings
from detox_ray.rewards.classifiers import check_classifier, load_classifier
from detox_ray.rewards.probability_calibration import Method
from detox_ray.rewards.revision import model_name
from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.calibration_fit import classifiers_read, key_of, probabilities, with_classifiers, with_fit
from detox_ray.serving.calibration_table import CalibrationTable
from detox_ray.serving.readings import check_labels

TABLE_FILE = "calibration.yaml"
# Of each class, in the half that is fitted and in the half that is measured.
MIN_OF_EACH = 20
# Texts a classifier reads between two moves of the progress bar.
CHUNK_TEXTS = 512
RESAMPLES = 2000

# (classifier, texts read, texts in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationColumns:
    """Which column holds what; the names are attributes, categories or classifiers of the service.

    `labels`: 0 and 1, or a probability that is toxic from 0.5 on. `references`: scores of others in [0, 1].
    """

    text: str = "text"
    labels: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)


def calibrate(
    path: str | Path,
    config: ApiConfig,
    folder: Path,
    columns: CalibrationColumns,
    method: Method | Literal["auto"] = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Fit the calibrations of a service on the labelled texts of a file, and write them with what they are worth.

    A classifier is fitted on the labels given for it, else on the first ones given for what reads its toxicity. Writes
    `calibration.yaml` (when there are labels), `calibration.json`, `calibration.md` and `calibration.html` into
    `folder`. A calibration that `config` has already is not used.

    Raises:
        ConfigError, ModelError: a name or a model does not fit the service.
        DataError: the file cannot be read, lacks a column, or has too few texts of a class.
        RewardError: a classifier failed.
    """
    labels = with_classifiers({key_of(name, config): column for name, column in columns.labels.items()}, config)
    references = {key_of(name, config): column for name, column in columns.references.items()}
    if not labels and not references:
        raise ConfigError(
            "nothing to do: give --labels NAME=COLUMN to fit, --reference NAME=COLUMN to compare, or both"
        )
    if folder.is_file():
        raise ConfigError(f"{folder} is a file: give a folder for the table and its report")
    data = read_labelled_texts(path, columns.text, list(dict.fromkeys([*labels.values(), *references.values()])))
    fitted_half = in_fitted_half(data.texts, seed) if labels else np.zeros(len(data.texts), dtype=bool)
    for column in dict.fromkeys(labels.values()):
        _check_classes(path, column, data.numbers[column], fitted_half)
    config = config.model_copy(update={"reward": resolve_lab(config.reward), "calibration": CalibrationTable()})
    check_labels(config)
    for classifier in config.reward.classifiers:
        check_classifier(classifier)
    needed = {name for key in [*labels, *references] for name in classifiers_read(key, config)}
    parts = read_all([c for c in config.reward.classifiers if c.name in needed], data.texts, progress)
    fitted = config
    for key, column in labels.items():
        numbers = data.numbers[column]
        rows = fitted_half & ~np.isnan(numbers)
        fitted = with_fit(key, fitted, parts, numbers >= TOXIC_THRESHOLD, rows, method, seed)
    report = _Heldout(data, ~fitted_half, config, fitted, parts, seed).report(path, columns.text, labels, references)
    write_calibration(folder, report)
    if labels:
        write_atomically(folder / TABLE_FILE, table_yaml(fitted.calibration, report.source))
    return report


@dataclass(frozen=True)
class _Heldout:
    """The texts that no map was fitted on (`rows: [N] bool`), as the service scores them before and after."""

    data: LabelledTexts
    rows: np.ndarray
    before: ApiConfig
    after: ApiConfig
    parts: Mapping[str, Sequence[Readings]]
    seed: int

    def report(
        self, path: str | Path, text_column: str, labels: Mapping[str, str], references: Mapping[str, str]
    ) -> CalibrationReport:
        """What was fitted by key and column of `labels`, and the agreement by those of `references`."""
        heldout = int(self.rows.sum())
        return CalibrationReport(
            source=Path(path).name,
            text_column=text_column,
            rows=self.data.rows,
            texts=len(self.data.texts),
            left_out=self.data.left_out,
            missing=self.data.missing,
            fitted_texts=len(self.rows) - heldout,
            heldout_texts=heldout,
            seed=self.seed,
            models={c.name: model_name(c) for c in self.before.reward.classifiers if c.name in self.parts},
            fitted=[self._fitted(key, column) for key, column in labels.items()],
            agreements=[self._agreement(key, column, bool(labels)) for key, column in references.items()],
            versions=installed_versions(),
        )

    def _fitted(self, key: str, column: str) -> Fitted:
        numbers = self.data.numbers[column]
        rows = self.rows & ~np.isnan(numbers)
        toxic = numbers[rows] >= TOXIC_THRESHOLD
        before, after = (probabilities(key, config, self.parts)[rows] for config in (self.before, self.after))
        kind, _, name = key.partition(".")
        found = getattr(self.after.calibration, kind)[name]
        change = quality_change(before, after, toxic, RESAMPLES, self.seed)
        return Fitted(key, column, found, int(rows.sum()), int(toxic.sum()), change)

    def _agreement(self, key: str, column: str, is_calibrated: bool) -> Agreement:
        reference = self.data.numbers[column]
        rows = self.rows & ~np.isnan(reference)
        before, after = (probabilities(key, config, self.parts)[rows] for config in (self.before, self.after))
        return Agreement(
            key,
            column,
            int(rows.sum()),
            int((reference[rows] >= TOXIC_THRESHOLD).sum()),
            agreement(before, reference[rows], self.seed),
            agreement(after, reference[rows], self.seed) if is_calibrated else None,
        )


def named_columns(pairs: Sequence[str], option: str) -> dict[str, str]:
    """`["TOXICITY=toxic"]` as a dict.

    Raises:
        ConfigError: one is not of this form, or a name stands twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, column = pair.partition("=")
        if not name or not column:
            raise ConfigError(f"{option} {pair!r}: expected NAME=COLUMN, such as TOXICITY=toxic")
        if name in found:
            raise ConfigError(f"{option} {pair!r}: {name} has the column {found[name]!r} already; give it one")
        found[name] = column
    return found


def in_fitted_half(texts: Sequence[str], seed: int) -> np.ndarray:
    """`[N] bool`; goes by seed and text, so that texts that agree but for case and white space are on one side."""
    return np.array([hashlib.sha256(f"{seed}\n{normalized(text)}".encode()).digest()[0] % 2 == 0 for text in texts])


def read_all(
    classifiers: Sequence[ClassifierConfig], texts: Sequence[str], progress: Progress | None = None
) -> dict[str, list[Readings]]:
    """What each classifier says of the texts, by its name, in parts; one classifier in memory after the other.

    Raises:
        ConfigError, ModelError, RewardError: as `load_classifier` and `Classifier.read`.
    """
    parts: dict[str, list[Readings]] = {}
    for classifier in classifiers:
        loaded = load_classifier(classifier)
        parts[classifier.name] = found = []
        for start in range(0, len(texts), CHUNK_TEXTS):
            found.append(loaded.read(texts[start : start + CHUNK_TEXTS]))
            if progress is not None:
                progress(classifier.name, min(start + CHUNK_TEXTS, len(texts)), len(texts))
    return parts


def agreement(scores: np.ndarray, reference: np.ndarray, seed: int = 0) -> Agreed:
    """How `scores: [N]` agree with `reference: [N]`, both in [0, 1]."""
    return Agreed(
        spearman(scores, reference, RESAMPLES, seed), roc_auc(scores, reference >= TOXIC_THRESHOLD, RESAMPLES, seed)
    )


def table_yaml(table: CalibrationTable, source: str) -> str:
    """The table as the YAML that the service's configuration names."""
    tree = table.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return f"# Fitted by detox-ray calibrate on {source}; `calibration: FILE` in the service's configuration.\n{text}"


def _check_classes(path: str | Path, column: str, numbers: np.ndarray, fitted_half: np.ndarray) -> None:
    """Raises DataError when one of the halves has too few texts of a class."""
    for half in (fitted_half, ~fitted_half):
        labels = numbers[half & ~np.isnan(numbers)] >= TOXIC_THRESHOLD
        toxic, other = int(labels.sum()), int((~labels).sum())
        if min(toxic, other) < MIN_OF_EACH:
            raise DataError(
                f"{path}: by column {column!r} one half of the texts has {toxic:,} toxic and {other:,} other ones; one "
                f"half is fitted and the other measured, and each needs at least {MIN_OF_EACH} of both: give more texts"
            )
