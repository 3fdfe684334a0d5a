"""What several reports write alike: values for JSON, counts in words, a table for the terminal."""

import math
from typing import Any

from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table as TerminalTable

from detox_ray.evaluation.tables import Table


def counts_text(counts: dict[str, int]) -> str:
    """ "3 duplicate; 2 empty text"."""
    return "; ".join(f"{count:,} {reason}" for reason, count in counts.items())


def jsonable(value: Any) -> Any:
    """Dataclasses, intervals and configurations as objects, what is not finite as None."""
    if isinstance(value, BaseModel):
        return jsonable(value.model_dump(mode="json"))
    if hasattr(value, "__dataclass_fields__"):
        return {name: jsonable(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "_asdict"):
        return jsonable(value._asdict())
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def terminal_table(content: Table, title: str, caption: str = "") -> TerminalTable:
    """The table for the terminal, with `title` above and `caption` below it."""
    table = TerminalTable(title=escape(title), caption=escape(caption), caption_justify="left", caption_style="")
    for column in content.columns:
        table.add_column(
            escape(column.label) + (f"\n[dim]{escape(column.detail)}[/dim]" if column.detail else ""),
            justify="left" if column is content.columns[0] else "right",
        )
    for row in content.rows:
        details = ((cell.value, cell.interval, cell.change) for cell in row.cells)
        cells = (value + "".join(f"\n[dim]{more}[/dim]" for more in rest if more) for value, *rest in details)
        label = escape(row.label) + (f"\n[dim]{escape(row.explanation)}[/dim]" if row.explanation else "")
        table.add_row(label, *cells)
    return table
