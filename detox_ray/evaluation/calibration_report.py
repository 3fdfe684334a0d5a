"""What a calibration found, as calibration.json, calibration.md, a page that opens offline, and terminal tables."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table as TerminalTable

from detox_ray.evaluation.calibration_metrics import BINS
from detox_ray.evaluation.calibration_tables import Agreement, Fitted, reliability_figure, tables
from detox_ray.evaluation.markdown import markdown_table, plain
from detox_ray.evaluation.page import render_page
from detox_ray.evaluation.report_parts import counts_text, jsonable, terminal_table
from detox_ray.metrics_file import write_atomically

FORMAT = 1
TITLE = "Calibration of toxicity scores"
MEANING = (
    "A probability is calibrated when, of the texts that are given 0.7, 70% are toxic. ECE is the expected "
    "calibration error (Guo et al. 2017): the mean distance between the probability and the share of toxic texts in "
    f"{BINS} equal bins, 0 at best. In small samples it is biased upwards, and its interval more so: a lower end "
    "above 0 proves nothing. Log loss is in nats per text; lower is better. ROC-AUC is the chance that a toxic text "
    "scores above another, and Spearman's correlation compares the order of the texts with the reference's. A "
    "calibration turns no order round, but the mean of calibrated classifiers may order texts in another way than the "
    "mean of raw ones. It holds for texts like these: where another share is toxic, it has to be fitted again."
)


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration of the scores of a service on the texts of a file.

    `rows` of the file were read, `texts` of them used; `left_out` counts the others by reason, `missing` the used ones
    without a number by column. Maps were fitted on `fitted_texts` and measured on the `heldout_texts` others.
    """

    source: str
    text_column: str
    rows: int
    texts: int
    left_out: dict[str, int]
    missing: dict[str, int]
    fitted_texts: int
    heldout_texts: int
    seed: int
    models: dict[str, str]
    fitted: list[Fitted]
    agreements: list[Agreement]
    versions: dict[str, str]


def write_calibration(folder: Path, report: CalibrationReport) -> Path:
    """Write `calibration.json`, `calibration.md` and `calibration.html` into the folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"format": FORMAT} | jsonable(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / "calibration.json", content)
    write_atomically(folder / "calibration.md", calibration_markdown(report))
    path = folder / "calibration.html"
    write_atomically(path, _page(report))
    return path


def calibration_markdown(report: CalibrationReport) -> str:
    """The report as Markdown, without the diagrams."""
    parts = [f"# {TITLE}", plain(setting(report))]
    for table in tables(report.fitted, report.agreements):
        parts += [f"## {plain(table.title)}", markdown_table(table)]
    parts += [plain(MEANING), "## What was calibrated"]
    parts.append("\n".join(f"- {plain(term)}: {plain(found)}" for term, found in facts(report)))
    return "\n\n".join(parts) + "\n"


def calibration_tables(report: CalibrationReport) -> list[TerminalTable]:
    """The tables for the terminal."""
    return [terminal_table(content, content.title) for content in tables(report.fitted, report.agreements)]


def setting(report: CalibrationReport) -> str:
    """What was done, in one or two sentences."""
    left_out = sum(report.left_out.values())
    rows = f"{left_out:,} rows left out" if left_out else "no row left out"
    split = (
        f" Fitted on {report.fitted_texts:,} of them; everything below is measured on the other "
        f"{report.heldout_texts:,}, which no fit has seen."
        if report.fitted
        else ""
    )
    return f"{report.texts:,} texts of {report.source}, {rows}.{split}"


def facts(report: CalibrationReport) -> list[tuple[str, str]]:
    """What was calibrated, in a few lines, with what was left out and why."""
    missing = {f"texts without {column}": count for column, count in report.missing.items() if count}
    rows = {
        "File": report.source,
        "Text column": report.text_column,
        "Rows read": f"{report.rows:,}",
        "Rows left out": counts_text(report.left_out) or "none",
        "Without a number": counts_text(missing),
        "Seed": f"{report.seed}",
        "Models": ", ".join(f"{name} ({model})" for name, model in report.models.items()),
        "Versions": ", ".join(f"{package} {number}" for package, number in report.versions.items()),
    }
    return [(term, found) for term, found in rows.items() if found]


def _page(report: CalibrationReport) -> str:
    return render_page(
        "calibration.html.jinja",
        title=TITLE,
        setting=setting(report),
        meaning=MEANING,
        tables=tables(report.fitted, report.agreements),
        figures=[reliability_figure(number, fitted) for number, fitted in enumerate(report.fitted)],
        facts=facts(report),
    )
