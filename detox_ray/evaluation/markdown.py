"""The Markdown twin of the report: the same numbers and tables, without figures and without a quoted response."""

from detox_ray.evaluation.content import ReportContent
from detox_ray.evaluation.tables import Cell, Table


def markdown_report(content: ReportContent) -> str:
    """The report as Markdown with tables as GitHub draws them."""
    parts = [f"# {plain(content.title)}", plain(content.setting)]
    for headline in content.headlines:
        parts.append(f"**{plain(headline.verdict)}**")
        parts.append(bullets(headline.cautions))
    parts.append(bullets([*content.warnings, *content.rejections]))
    if content.is_lab:
        parts.append(
            "This run used the built-in lab; it proves that the machinery works and says nothing of other models."
        )
    parts += ["## All metrics", markdown_table(content.metrics), *map(plain, content.small_print)]
    parts += _tables("## By split", content.split_metrics)
    parts += _tables("## Reductions", content.studies)
    if content.pair_summaries:
        parts += ["## Pairs", bullets([f"{name}: {found}" for name, found in content.pair_summaries.items()])]
    parts += _tables("## Responses moving between toxicity buckets", content.flows)
    parts += _tables("## Scorers", content.scorers)
    if content.evaluations:
        parts += ["## During training", markdown_table(content.evaluations)]
    if content.analysis:
        # The words are left to the page, which can veil one.
        parts += ["## Inside the model", bullets(content.analysis.summary), markdown_table(content.analysis.measures)]
    if content.examples:
        parts += ["## Examples", bullets([_example_counts(content)])]
    parts += ["## What was run", bullets([f"{term}: {found}" for term, found in content.facts])]
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


def bullets(sentences: list[str]) -> str:
    """A list, a sentence an item."""
    return "\n".join(f"- {plain(sentence)}" for sentence in sentences)


def _tables(heading: str, found: list[Table]) -> list[str]:
    if not found:
        return []
    return [heading, *(part for table in found for part in (f"### {plain(table.title)}", markdown_table(table)))]


def _example_counts(content: ReportContent) -> str:
    found = "; ".join(
        f"{e.system}: {len(e.improved)} improved most, {len(e.worsened)} worsened most, {len(e.pairs)} at random"
        for e in content.examples
    )
    return f"{found}; in report.html, hidden until asked for."


def _cell(cell: Cell) -> str:
    text = f"{cell.value} ({cell.interval})" if cell.interval else cell.value
    return plain(f"{text}; {cell.change}" if cell.change else text)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
