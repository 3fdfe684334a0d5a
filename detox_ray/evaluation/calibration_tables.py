"""The tables and reliability diagrams of a calibration, formatted once for the page, Markdown and the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from detox_ray.evaluation.calibration_metrics import Bin, QualityChange
from detox_ray.evaluation.figures import Figure, error_bars, page_figure, system_colour
from detox_ray.evaluation.metric_format import MINUS, UNKNOWN
from detox_ray.evaluation.metrics import Interval
from detox_ray.evaluation.tables import Cell, Column, Row, Table
from detox_ray.rewards.probability_calibration import FittedMap

ARROW = "\N{NO-BREAK SPACE}\N{RIGHTWARDS ARROW}\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Fitted:
    """A calibration, what it was fitted on, and what it did to texts it was not fitted on.

    `key` is such as `attributes.TOXICITY`; `column` holds the labels.
    """

    key: str
    column: str
    found: FittedMap
    heldout_texts: int
    heldout_toxic: int
    change: QualityChange


@dataclass(frozen=True)
class Agreed:
    """How a probability agrees with a reference; ROC-AUC is of telling references of 0.5 and more from the others."""

    spearman: Interval
    roc_auc: Interval


@dataclass(frozen=True)
class Agreement:
    """Agreement with the reference scores in `column`; `after` is None where nothing was calibrated."""

    key: str
    column: str
    texts: int
    high: int
    before: Agreed
    after: Agreed | None


def tables(fitted: Sequence[Fitted], agreements: Sequence[Agreement]) -> list[Table]:
    """What calibration did, and the agreement with reference scores; a table without rows is left out."""
    return [table for table in (_quality_table(fitted), _agreement_table(agreements)) if table.rows]


def reliability_figure(number: int, fitted: Fitted) -> Figure:
    """Share of toxic texts against their mean probability, before and after; on the diagonal both are the same."""
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": "#8c8c8c", "dash": "dot", "width": 1}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    for place, (name, quality) in enumerate({"before": fitted.change.before, "after": fitted.change.after}.items()):
        _add_bins(figure, name, quality.bins, place)
    figure.update_layout(hovermode="closest", showlegend=True)
    figure.update_xaxes(title_text="mean probability", range=[-0.03, 1.03])
    figure.update_yaxes(title_text="share toxic", range=[-0.03, 1.03])
    before, after = (q.calibration_error.value for q in (fitted.change.before, fitted.change.after))
    summary = (
        f"ECE {before:.3f} before, {after:.3f} after ({method_label(fitted.found)}), "
        f"on {fitted.heldout_texts:,} texts, {fitted.heldout_toxic:,} of them toxic; bars are 95% intervals."
    )
    return page_figure(f"reliability-{number}", _name(fitted.key), summary, figure)


def method_label(found: FittedMap) -> str:
    """The method with its number, in a few words."""
    match found.method:
        case "temperature":
            return f"temperature {found.temperature:.2f}"
        case "isotonic":
            return f"isotonic, {len(found.knots)} knots"
    return "left as it is"


def _add_bins(figure: go.Figure, name: str, bins: Sequence[Bin], place: int) -> None:
    figure.add_scatter(
        x=[b.mean_probability for b in bins],
        y=[b.toxic.value for b in bins],
        name=name,
        mode="lines+markers",
        line={"color": system_colour(place), "width": 1.5},
        marker={"color": system_colour(place), "size": 7},
        error_y=error_bars((b.toxic.value, b.toxic.low, b.toxic.high) for b in bins),
        customdata=[[b.toxic.count, b.toxic.total] for b in bins],
        hovertemplate="probability %{x:.3f}: %{customdata[0]} of %{customdata[1]} toxic (%{y:.3f})",
    )


def _quality_table(fitted: Sequence[Fitted]) -> Table:
    columns = (Column("Probability of"), Column("Fitted"), Column("ECE"), Column("Log loss"), Column("ROC-AUC"))
    rows = tuple(
        Row(
            _name(f.key),
            (
                Cell(method_label(f.found), f"on {f.found.texts:,}, {f.found.toxic:,} toxic"),
                _cell(before.calibration_error, after.calibration_error, f.change.calibration_error_change),
                _cell(before.log_loss, after.log_loss, f.change.log_loss_change),
                _cell(before.roc_auc, after.roc_auc),
            ),
            f"labels {f.column}; {f.heldout_texts:,} texts, {f.heldout_toxic:,} toxic",
        )
        for f in fitted
        for before, after in [(f.change.before, f.change.after)]
    )
    note = (
        "Before \N{RIGHTWARDS ARROW} after; then the 95% bootstrap interval of the latter, and the change with its own."
    )
    return Table("quality", "Before and after, on held-out texts", columns, rows, note)


def _agreement_table(agreements: Sequence[Agreement]) -> Table:
    columns = (
        *(Column("Probability of"), Column("Texts"), Column("Reference at least 0.5")),
        *(Column("Spearman"), Column("ROC-AUC at 0.5")),
    )
    rows = tuple(
        Row(
            _name(a.key),
            (
                Cell(f"{a.texts:,}"),
                Cell(f"{a.high:,}"),
                _cell(a.before.spearman, a.after.spearman if a.after else None),
                _cell(a.before.roc_auc, a.after.roc_auc if a.after else None),
            ),
            f"reference {a.column}",
        )
        for a in agreements
    )
    note = "With 95% bootstrap intervals over texts; where something was calibrated, before \N{RIGHTWARDS ARROW} after."
    return Table("agreement", "Agreement with reference scores", columns, rows, note)


def _cell(before: Interval, after: Interval | None, change: Interval | None = None) -> Cell:
    """Both values, or the only one, with the interval of the last, and the change with its interval."""
    last = after or before
    if math.isnan(last.value):
        return Cell(UNKNOWN)
    value = f"{before.value:.3f}" + (f"{ARROW}{after.value:.3f}" if after else "")
    more = "" if change is None else f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
    return Cell(*(part.replace("-", MINUS) for part in (value, f"{last.low:.3f} to {last.high:.3f}", more)))


def _name(key: str) -> str:
    """`attributes.TOXICITY` -> "attribute TOXICITY"."""
    kind, _, name = key.partition(".")
    return f"{ {'attributes': 'attribute', 'categories': 'category', 'classifiers': 'classifier'}[kind] } {name}"
