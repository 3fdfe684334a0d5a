"""The Markdown twin of the report: the same numbers and tables, without figures and without a quoted response."""

from markupsafe import Markup

from detox_ray.evaluation.analysis_figures import AnalysisTable
from detox_ray.evaluation.content import ReportContent
from detox_ray.evaluation.tables import Cell, Table


def markdown_report(content: ReportContent) -> str:
    """The report as Markdown with tables as GitHub draws them."""
    parts = [f"# {plain(content.title)}", plain(content.setting)]
    for headline in content.headlines:
        parts.append(f"**{plain(headline.verdict)}**")
        parts.append(_bullets(headline.cautions))
    parts.append(_bullets([*content.warnings, *content.rejections]))
    if content.is_lab:
        parts.append(
            "This run used the built-in lab; it proves that the machinery works and says nothing of other models."
        )
    parts += ["## All metrics", markdown_table(content.metrics), *map(plain, content.small_print)]
    parts += _tables("## By split", content.split_metrics)
    parts += _tables("## Reductions", content.studies)
    if content.pair_summaries:
        parts += ["## Pairs", _bullets([f"{name}: {found}" for name, found in content.pair_summaries.items()])]
    parts += _tables("## Responses moving between toxicity buckets", content.flows)
    parts += _tables("## Scorers", content.scorers)
    if content.evaluations:
        parts += ["## During training", markdown_table(content.evaluations)]
    if content.analysis:
        parts += ["## Inside the model", _bullets(content.analysis.summary)]
        # The tables of words are left to the page, which can veil a word.
        parts += [_analysis_table(table) for table in content.analysis.tables if table.columns[0] != "Word"]
    if content.examples:
        parts += ["## Examples", _bullets([_example_counts(content)])]
    parts += ["## What was run", _bullets([f"{term}: {found}" for term, found in content.facts])]
    versions = ", ".join(f"{package} {number}" for package, number in content.versions.items())
    parts.append(f"Versions: {plain(versions)}" if versions else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """The table with its note; an interval stands in brackets beside its number."""
    headings = [
        plain(column.label) + (f" ({plain(column.detail)})" if column.detail else "") for column in table.columns
    ]
    lines = [_line(headings), _line(["---", *["---:"] * (len(headings) - 1)])]
    lines += [_line([plain(row.label), *map(_cell, row.cells)]) for row in table.rows]
    return "\n".join(lines) + (f"\n\n{plain(table.note)}" if table.note else "")


def plain(text: str) -> str:
    """A name or sentence that Markdown shows literally: no markup, on one line, no end of a table's cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*[]|":
        text = text.replace(character, f"\\{character}")
    return text


def _tables(heading: str, found: list[Table]) -> list[str]:
    if not found:
        return []
    return [heading, *(part for table in found for part in (f"### {plain(table.title)}", markdown_table(table)))]


def _bullets(sentences: list[str]) -> str:
    return "\n".join(f"- {plain(sentence)}" for sentence in sentences)


def _example_counts(content: ReportContent) -> str:
    found = "; ".join(
        f"{e.system}: {len(e.improved)} improved most, {len(e.worsened)} worsened most, {len(e.pairs)} at random"
        for e in content.examples
    )
    return f"{found}; in report.html, hidden until asked for."


def _analysis_table(table: AnalysisTable) -> str:
    rows = [[_from_html(cell) for cell in row] for row in table.rows]
    lines = [_line([plain(column) for column in table.columns])]
    lines.append(_line(["---", *["---:"] * (len(table.columns) - 1)]))
    lines += [_line([plain(cell) for cell in row]) for row in rows]
    return "\n".join(lines) + f"\n\n{plain(table.note)}"


def _from_html(cell: str | Markup) -> str:
    """A cell as text, its interval in brackets; a string that is no markup stands for itself."""
    if not isinstance(cell, Markup):
        return cell
    return Markup(cell.replace("<small>", " (").replace("</small>", ")")).striptags()


def _cell(cell: Cell) -> str:
    text = f"{cell.value} ({cell.interval})" if cell.interval else cell.value
    return plain(f"{text}; {cell.change}" if cell.change else text)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
