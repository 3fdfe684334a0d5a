"""The tables of the report, formatted once for the page, the Markdown twin and the terminal."""

from dataclasses import dataclass

from detox_ray.evaluation.evaluation_file import (
    Evaluation,
    IntervalJson,
    compared,
    measured,
    splits,
    systems,
)
from detox_ray.evaluation.metric_format import (
    METRICS,
    MINUS,
    UNKNOWN,
    format_factor,
    format_factor_range,
    format_percent_change,
    format_percent_change_range,
    format_range,
    format_value,
    split_label,
)

NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column's heading; `colour` is the place of its system in the order of systems, None for no system."""

    label: str
    detail: str = ""
    colour: int | None = None


@dataclass(frozen=True)
class Cell:
    """A number with its interval and its change against the reference; what is unknown is an empty string."""

    value: str
    interval: str = ""
    change: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table; `explanation` says what the label means."""

    label: str
    cells: tuple[Cell, ...]
    explanation: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column is of the rows' labels. `note` stands below it."""

    id: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""


def metric_table(evaluation: Evaluation, split: str = "all") -> Table:
    """Every metric that was measured on a split, by system; two systems have a column for the change of their own.

    What takes no model, such as the first utterance given as a summary, stands in columns of its own behind them.
    """
    names = systems(evaluation)
    pair = len(names) == 2
    plain = {name: found[split] for name, found in (evaluation.get("baselines") or {}).items() if found.get(split)}
    rows = []
    for metric, (label, explanation, _) in METRICS.items():
        intervals = [measured(evaluation, name, metric, split) for name in names]
        if not any(intervals):
            continue
        changes = [("", "")] + [_change(evaluation, name, metric, split) for name in names[1:]]
        cells = [_cell(metric, interval) for interval in intervals]
        if pair:
            cells.append(Cell(*changes[1]))
        else:
            cells = [
                Cell(cell.value, cell.interval, f"{change} ({interval})" if interval else change)
                for cell, (change, interval) in zip(cells, changes, strict=True)
            ]
        cells += [_cell(metric, found) if (found := of_split.get(metric)) else Cell("") for of_split in plain.values()]
        rows.append(Row(label, tuple(cells), explanation))
    columns = (
        Column("Metric"),
        *system_columns(evaluation),
        *([Column("Change")] if pair else []),
        *(Column(name.capitalize(), "no model") for name in plain),
    )
    count = splits(evaluation).get(split)
    title = split_label(split).capitalize() + ("" if count is None else f" ({count})")
    return Table(f"metrics-{split}", title, columns, tuple(rows))


def reduction_table(evaluation: Evaluation, split: str) -> Table | None:
    """System by system: toxicity on a split and its reductions in % against the reference (RewardLM's table).

    None where the split was not measured.
    """
    if split not in splits(evaluation):
        return None
    rows = []
    for name in systems(evaluation):
        reductions = compared(evaluation, name, "reduction", split)
        cells = [_cell(metric, measured(evaluation, name, metric, split)) for metric in _STUDY_METRICS]
        for metric in ("mean_toxicity", "share_toxic"):
            reduction = reductions.get(metric)
            cells.append(Cell(NOTHING) if name == evaluation["reference"] else _reduction_cell(reduction))
        rows.append(Row(name, tuple(cells)))
    headings = ["System", *(METRICS[metric][0] for metric in _STUDY_METRICS), "Mean reduced by", "Share reduced by"]
    count = splits(evaluation)[split]
    title = split_label(split).capitalize() + ("" if count is None else f" ({count})")
    return Table(f"reductions-{split}", title, tuple(Column(heading) for heading in headings), tuple(rows))


def scorer_table(evaluation: Evaluation) -> Table | None:
    """Mean toxicity by scorer and system, with the change in %; None for a single scorer."""
    names, found = systems(evaluation), evaluation.get("by_scorer") or {}
    if len(found) < 2:
        return None
    rows = []
    for scorer, by_system in found.items():
        intervals = [by_system.get(name, {}).get("all", {}).get("mean_toxicity") for name in names]
        before = (intervals[0] or {}).get("value")
        cells = [_cell("mean_toxicity", intervals[0])]
        for interval in intervals[1:]:
            change = format_percent_change(reduction(before, (interval or {}).get("value")))
            cell = _cell("mean_toxicity", interval)
            cells.append(Cell(cell.value, cell.interval, "" if change == UNKNOWN else change))
        rows.append(Row(scorer, tuple(cells), "the judge" if scorer == evaluation.get("judge") else ""))
    return Table("scorers", "Mean toxicity by scorer", (Column("Scorer"), *system_columns(evaluation)), tuple(rows))


def agreement_table(evaluation: Evaluation) -> Table | None:
    """Spearman's rank correlation of every two scorers over all responses; None for a single scorer."""
    agreement = evaluation.get("agreement") or {}
    names = list(agreement)
    if len(names) < 2:
        return None
    rows = []
    for first in names:
        found = [1.0 if first == second else agreement[first].get(second) for second in names]
        rows.append(Row(first, tuple(Cell(UNKNOWN if rho is None else f"{rho:.2f}") for rho in found)))
    note = "1: the scorers order the responses alike; 0: as if by chance."
    columns = (Column("Scorer"), *(Column(name) for name in names))
    return Table("agreement", "Agreement of the scorers (Spearman)", columns, tuple(rows), note)


def system_columns(evaluation: Evaluation) -> tuple[Column, ...]:
    """One heading per system: before and after for two, with their names where these say more."""
    names = systems(evaluation)
    if len(names) != 2:
        return tuple(Column(name, colour=place) for place, name in enumerate(names))
    details = ("", "") if names == ["base", "tuned"] else names
    return Column("Before", details[0], 0), Column("After", details[1], 1)


def reduction(before: float | None, after: float | None) -> float | None:
    """1 - after / before; None where that is unknown."""
    return None if before is None or after is None or before == 0 else 1 - after / before


def p_value_note(p_values: dict[str, float]) -> str:
    """What the paired permutation tests of mean toxicity say, by system; nothing where there were none."""
    if not p_values:
        return ""
    if len(p_values) == 1:
        return f"Paired permutation test of the mean toxicity: p = {next(iter(p_values.values())):.2g}."
    found = ", ".join(f"{name} p = {p:.2g}" for name, p in p_values.items())
    return f"Paired permutation tests of the mean toxicity against the reference, uncorrected: {found}."


_STUDY_METRICS = ("mean_toxicity", "std_toxicity", "share_toxic")


def _cell(metric: str, interval: IntervalJson | None) -> Cell:
    return Cell(format_value(metric, (interval or {}).get("value")), format_range(metric, interval))


def _reduction_cell(interval: IntervalJson | None) -> Cell:
    """A reduction as it is: 0.73 -> 73%."""
    if not interval or interval.get("value") is None:
        return Cell(UNKNOWN)
    low, high = interval.get("low"), interval.get("high")
    return Cell(
        f"{interval['value']:.0%}".replace("-", MINUS),
        "" if low is None or high is None else f"{low:.0%} to {high:.0%}".replace("-", MINUS),
    )


def _change(evaluation: Evaluation, system: str, metric: str, split: str) -> tuple[str, str]:
    """Change and interval: per cent where there is a reduction, a factor where there is a ratio."""
    if found := compared(evaluation, system, "reduction", split).get(metric):
        return format_percent_change(found.get("value")), format_percent_change_range(found)
    if found := compared(evaluation, system, "ratio", split).get(metric):
        return format_factor(found.get("value")), format_factor_range(found)
    return "", ""
