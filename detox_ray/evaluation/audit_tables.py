"""The tables and the figure of an audit, formatted once for the page, the Markdown twin and the terminal."""

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from detox_ray.evaluation.figures import Figure, error_bars, escaped, page_figure, shortened, system_colour
from detox_ray.evaluation.group_toxicity import PolicyAudit
from detox_ray.evaluation.metrics import CONFIDENCE, Interval
from detox_ray.evaluation.proportions import Proportion
from detox_ray.evaluation.scorer_audit import (
    SMALL_CELL,
    TOLERATED_RATE,
    Comparison,
    ErrorRates,
    Mention,
    ScorerAudit,
    mention_kind,
)
from detox_ray.evaluation.tables import NOTHING, Cell, Column, Row, Table

# More groups than this do not fit into a figure; the table has all.
GROUPS_DRAWN = 16
_NAME_LENGTH = 20  # characters of a group's name beside its dots
SMALL_MARK = "*"
RELIABLE_MARK = "\N{BLACK UP-POINTING TRIANGLE}"
SMALL_NOTE = f"{SMALL_MARK} fewer than {SMALL_CELL}: read the interval, not the rate."
FALSE_POSITIVES = "False positives: non-toxic cases judged toxic"
FALSE_NEGATIVES = "False negatives: toxic cases not judged toxic"

Rate = Callable[[ErrorRates], Proportion | None]


def sections(
    scorers: Sequence[ScorerAudit], policy: PolicyAudit | None, functionalities: Sequence[str]
) -> dict[str, list[Table]]:
    """Heading -> its tables, in reading order; a part without numbers is left out."""
    by_functionality = [
        _rate_table("fpr-functionality", FALSE_POSITIVES, "Functionality", scorers, _by_functionality, _false_positive),
        _rate_table("fnr-functionality", FALSE_NEGATIVES, "Functionality", scorers, _by_functionality, _false_negative),
    ]
    by_group = [
        _rate_table("fpr-group", FALSE_POSITIVES, "Group", scorers, _by_group, _false_positive),
        _rate_table("fnr-group", FALSE_NEGATIVES, "Group", scorers, _by_group, _false_negative),
        _auc_table(scorers),
    ]
    found = {
        "Overall": [_overall_table(scorers)],
        "Mere mention of a group": [_mention_table(scorer, functionalities) for scorer in scorers if scorer.mentions],
        "By group": by_group,
        "By functionality": by_functionality,
        "Responses to prompts that mention a group": [_policy_table(policy)] if policy else [],
    }
    filled = {heading: [table for table in tables if table.rows] for heading, tables in found.items()}
    return {heading: tables for heading, tables in filled.items() if tables}


def terminal_table(scorers: Sequence[ScorerAudit]) -> Table:
    """Both error rates overall and by group."""
    columns = [Column(scorer.name, rate) for scorer in scorers for rate in ("false positives", "false negatives")]
    parts: list[tuple[str, list[ErrorRates]]] = [("all cases", [scorer.overall for scorer in scorers])]
    parts += [(group, [scorer.by_group[group] for scorer in scorers]) for group in scorers[0].by_group]
    rows = [
        Row(label, tuple(_rate_cell(rate(cell)) for cell in cells for rate in (_false_positive, _false_negative)))
        for label, cells in parts
    ]
    return Table("terminal", "", (Column("cases"), *columns), tuple(rows))


def group_figure(scorers: Sequence[ScorerAudit], functionalities: Sequence[str]) -> Figure | None:
    """Dots with intervals: each scorer's false-positive rate on mere mentions of each group; None without groups."""
    rates = {scorer.name: {mention.group: mention.rate for mention in scorer.mentions} for scorer in scorers}
    groups = sorted(next(iter(rates.values()), {}))
    if not groups:
        return None
    most = sorted(groups, key=lambda group: -rates[scorers[0].name][group].total)[:GROUPS_DRAWN]
    # Upwards on the axis, so that the first name stands on top.
    drawn = sorted(most, reverse=True)
    figure = go.Figure()
    for place, (name, by_group) in enumerate(rates.items()):
        found = [by_group[group] for group in drawn]
        shift = 0.5 * ((place + 0.5) / len(rates) - 0.5)
        figure.add_scatter(
            x=[100 * rate.value for rate in found],
            y=[number - shift for number in range(len(drawn))],
            name=name,
            mode="markers",
            marker={"color": system_colour(place), "size": 9},
            error_x=error_bars((100 * rate.value, 100 * rate.low, 100 * rate.high) for rate in found),
            customdata=[[escaped(group), rate.count, rate.total] for group, rate in zip(drawn, found, strict=True)],
            hovertemplate="%{customdata[0]}: %{customdata[1]} of %{customdata[2]} (%{x:.1f}%)",
        )
    kind = mention_kind(functionalities)
    figure.update_xaxes(title_text="judged toxic, %", range=[-2, 102])
    figure.update_yaxes(
        tickvals=list(range(len(drawn))),
        ticktext=[escaped(shortened(group, _NAME_LENGTH)) for group in drawn],
        range=[-0.6, len(drawn) - 0.4],
        zeroline=False,
    )
    figure.update_layout(hovermode="closest", showlegend=True)
    spans = [_span(name, [by_group[group] for group in groups]) for name, by_group in rates.items()]
    fewer = f" The {GROUPS_DRAWN} groups with most cases are drawn." if len(groups) > len(drawn) else ""
    summary = f"Share judged toxic, from the lowest to the highest group, with 95% intervals. {' '.join(spans)}{fewer}"
    return page_figure("mentions", f"False positives on {kind}, by group", summary, figure)


def _overall_table(scorers: Sequence[ScorerAudit]) -> Table:
    columns = (Column("Scorer"), Column("False positives"), Column("False negatives"), Column("ROC-AUC"))
    rows = tuple(
        Row(
            scorer.name,
            (
                _rate_cell(scorer.overall.false_positive),
                _rate_cell(scorer.overall.false_negative),
                _auc_cell(scorer.overall),
            ),
        )
        for scorer in scorers
    )
    note = (
        "False positives: share of the non-toxic cases judged toxic; false negatives: share of the toxic cases not "
        "judged toxic; with 95% intervals (Wilson 1927). Cases made from one template are not independent, so these "
        "overall intervals are somewhat too narrow. Toxic is what the file labels so, whatever a scorer was built for."
    )
    return Table("overall", "All cases", columns, rows, note)


def _rate_table(
    identity: str,
    title: str,
    label: str,
    scorers: Sequence[ScorerAudit],
    part: Callable[[ScorerAudit], dict[str, ErrorRates]],
    rate: Rate,
) -> Table:
    rows = []
    for name in part(scorers[0]):
        rates = [rate(part(scorer)[name]) for scorer in scorers]
        if any(rates):
            rows.append(Row(name, tuple(map(_rate_cell, rates))))
    columns = (Column(label), *(Column(scorer.name, colour=place) for place, scorer in enumerate(scorers)))
    return Table(identity, title, columns, tuple(rows), _small_note(rows))


def _auc_table(scorers: Sequence[ScorerAudit]) -> Table:
    columns = (Column("Group"), *(Column(scorer.name, colour=place) for place, scorer in enumerate(scorers)))
    rows = tuple(
        Row(group, tuple(_auc_cell(scorer.by_group[group]) for scorer in scorers))
        for group in scorers[0].by_group
        if scorers[0].by_group[group].roc_auc is not None
    )
    return Table("auc-group", "ROC-AUC", columns, rows, "1 is perfect order, 0.5 chance, below 0.5 worse than chance.")


def _mention_table(scorer: ScorerAudit, functionalities: Sequence[str]) -> Table:
    without = scorer.mentions[0].no_group.others
    against = f"{without.value:.1%} of {without.total:,} without" if without else f"{TOLERATED_RATE:.0%} tolerated"
    columns = (Column("Group"), Column("Judged toxic"), Column("Above other groups"), Column(f"Above {against}"))
    rows = tuple(
        Row(
            mention.group,
            (_rate_cell(mention.rate), _comparison_cell(mention.other_groups), _comparison_cell(mention.no_group)),
        )
        for mention in scorer.mentions
    )
    title = f"{scorer.name}: {mention_kind(functionalities)}"
    return Table(f"mentions-{scorer.name}", title, columns, rows, _mention_note(scorer.mentions[0], rows))


def _mention_note(mention: Mention, rows: Sequence[Row]) -> str:
    note = (
        f"Differences in percentage points with intervals at {mention.confidence:.2%} each, so that all of them hold "
        f"together at {CONFIDENCE:.0%}; {RELIABLE_MARK} marks those reliably above zero, by interval and exact test."
    )
    return " ".join(filter(None, (note, _small_note(rows))))


def _policy_table(policy: PolicyAudit) -> Table:
    columns = (
        *(Column("System and group"), Column("Prompts"), Column("Responses")),
        *(Column("Mean toxicity"), Column("Share toxic")),
    )
    rows = tuple(
        Row(
            f"{found.system}: {found.group}",
            (
                Cell(f"{found.prompts:,}{_mark(found.prompts)}"),
                Cell(f"{found.responses:,}"),
                _interval_cell(found.mean_toxicity, ".3f"),
                _interval_cell(found.share_toxic, ".1%"),
            ),
        )
        for found in policy.rows
    )
    note = f"By the judge; 95% percentile bootstrap intervals over prompts. {_small_note(rows)}".strip()
    return Table("policy", "By system and group", columns, rows, note)


def _rate_cell(rate: Proportion | None) -> Cell:
    if rate is None:
        return Cell(NOTHING)
    counts = f"{rate.count:,} of {rate.total:,}{_mark(rate.total)}"
    return Cell(f"{rate.value:.1%}", f"{rate.low:.1%} to {rate.high:.1%}", counts)


def _comparison_cell(comparison: Comparison | None) -> Cell:
    if comparison is None:
        return Cell(NOTHING)
    value, low, high = (f"{100 * end:+.1f}".replace("-", "\N{MINUS SIGN}") for end in comparison.difference)
    mark = f"{RELIABLE_MARK}\N{NO-BREAK SPACE}" if comparison.is_reliable else ""
    return Cell(f"{mark}{value}", f"{low} to {high}")


def _auc_cell(errors: ErrorRates) -> Cell:
    return Cell(NOTHING if errors.roc_auc is None else f"{errors.roc_auc:.3f}")


def _interval_cell(interval: Interval, spec: str) -> Cell:
    return Cell(format(interval.value, spec), f"{interval.low:{spec}} to {interval.high:{spec}}")


def _mark(total: int) -> str:
    return SMALL_MARK if total < SMALL_CELL else ""


def _small_note(rows: Sequence[Row]) -> str:
    marked = any((cell.change or cell.value).endswith(SMALL_MARK) for row in rows for cell in row.cells)
    return SMALL_NOTE if marked else ""


def _span(name: str, rates: Sequence[Proportion]) -> str:
    lowest, highest = min(rate.value for rate in rates), max(rate.value for rate in rates)
    return f"{name}: {lowest:.1%} to {highest:.1%}."


def _by_group(scorer: ScorerAudit) -> dict[str, ErrorRates]:
    return scorer.by_group


def _by_functionality(scorer: ScorerAudit) -> dict[str, ErrorRates]:
    return scorer.by_functionality


def _false_positive(errors: ErrorRates) -> Proportion | None:
    return errors.false_positive


def _false_negative(errors: ErrorRates) -> Proportion | None:
    return errors.false_negative
