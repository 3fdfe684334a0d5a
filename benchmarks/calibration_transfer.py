"""Does a calibration that was fitted on one data set hold on others? alt-profanity-check, from file to file.

    python benchmarks/calibration_transfer.py FIT OTHER...

FIT and OTHER are `FILE:TEXT_COLUMN:LABEL_COLUMN`, with labels of 0 and 1 or probabilities, or with
`:LABEL_COLUMN=VALUE,VALUE` naming the values that mean toxic. The map is fitted on one half of FIT, as by `detox-ray
calibrate`, and measured on its other half and on all of each OTHER: expected calibration error (15 bins), log loss, and
what the calibration changed, with 95% bootstrap intervals over texts.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, machine, write_json
from rich.console import Console
from rich.table import Table

from detox_ray.calibration import RESAMPLES, in_fitted_half
from detox_ray.config import EvaluationConfig
from detox_ray.data.labelled_texts import read_labelled_texts
from detox_ray.data.tables import Tally, read_rows
from detox_ray.evaluation.calibration_metrics import QualityChange, quality_change
from detox_ray.evaluation.calibration_tables import method_label
from detox_ray.evaluation.metrics import TOXIC_THRESHOLD, Interval
from detox_ray.evaluation.report_parts import jsonable
from detox_ray.rewards.classifiers import load_classifier
from detox_ray.rewards.probability_calibration import FittedMap, calibrated, fit_map

PACKAGES = ("alt-profanity-check", "scikit-learn")
SCORER = EvaluationConfig().judge


def main() -> None:
    """Fit, apply, measure, print the table, write the JSON."""
    options = _options()
    console = Console()
    facts = machine(PACKAGES)
    console.print(describe(facts))
    scorer = load_classifier(SCORER)
    texts, toxic = _read(options.fit)
    raw = np.asarray(scorer.toxicity(texts), dtype=np.float64)
    half = in_fitted_half(texts, options.seed)
    found = fit_map(raw[half], toxic[half], options.method, options.seed)
    fitted = FittedMap(**found.model_dump(), texts=int(half.sum()), toxic=int(toxic[half].sum()))
    sets = {f"{_name(options.fit)}, other half": (raw[~half], toxic[~half])}
    for spec in options.others:
        texts, toxic = _read(spec)
        sets[_name(spec)] = (np.asarray(scorer.toxicity(texts), dtype=np.float64), toxic)
    results: dict[str, Any] = {}
    table = Table(title=f"{SCORER.name}: {method_label(fitted)}, fitted on {fitted.texts:,}, {fitted.toxic:,} toxic")
    for column in ("texts", "n (toxic)", "mean", "ECE", "change", "log loss", "change", "ROC-AUC"):
        table.add_column(column, justify="left" if column == "texts" else "right")
    for name, (raw, toxic) in sets.items():
        change = quality_change(raw, calibrated(raw, fitted), toxic, RESAMPLES, options.seed)
        results[name] = {"texts": len(toxic), "toxic": int(toxic.sum()), **jsonable(change)}
        table.add_row(name, f"{len(toxic):,} ({toxic.mean():.0%})", f"{raw.mean():.2f}", *_cells(change))
    console.print(table)
    write_json(options.out, {"map": fitted.model_dump(), "sets": results, "machine": facts})
    console.print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fit", metavar="FIT", help="FILE:TEXT_COLUMN:LABEL_COLUMN[=VALUE,...]")
    parser.add_argument("others", nargs="+", metavar="OTHER", help="in the same form")
    parser.add_argument("--method", choices=["auto", "temperature", "isotonic"], default="auto")
    parser.add_argument("--seed", type=int, default=0, help="chooses the half of FIT that is fitted (0)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/calibration_transfer.json"))
    return parser.parse_args()


def _read(spec: str) -> tuple[list[str], np.ndarray]:
    """Texts, and whether each is toxic, `[N] bool`."""
    file, text, label = spec.rsplit(":", 2)
    label, _, values = label.partition("=")
    if not values:
        data = read_labelled_texts(file, text, [label])
        return data.texts, data.numbers[label] >= TOXIC_THRESHOLD
    rows = [row for _, row in read_rows(Path(file), Tally()) if str(row[text]).strip()]
    return [row[text] for row in rows], np.array([str(row[label]) in values.split(",") for row in rows])


def _name(spec: str) -> str:
    file, text, _ = spec.rsplit(":", 2)
    return f"{Path(file).name} {text}"


def _cells(change: QualityChange) -> list[str]:
    before, after = change.before, change.after
    return [
        f"{before.calibration_error.value:.3f} to {after.calibration_error.value:.3f}",
        _change(change.calibration_error_change),
        f"{before.log_loss.value:.3f} to {after.log_loss.value:.3f}",
        _change(change.log_loss_change),
        f"{before.roc_auc.value:.3f}",
    ]


def _change(interval: Interval) -> str:
    return f"{interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


if __name__ == "__main__":
    main()
