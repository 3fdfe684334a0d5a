"""What a scoring found: totals over its parts, and the table of them."""

from collections import Counter
from typing import Any

from rich.table import Table

from detox_ray.scoring.folder import PartStatistics


def summarize(parts: dict[int, PartStatistics]) -> dict[str, Any]:
    """Rows, what was left out and noted, and by scorer the mean toxicity and the share >= 0.5 of what was scored."""
    left_out: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    totals: dict[str, tuple[int, float, int]] = {}
    for statistics in parts.values():
        left_out.update(statistics.left_out)
        noted.update(statistics.noted)
        for name, (count, total, toxic) in statistics.toxicity.items():
            before = totals.get(name, (0, 0.0, 0))
            totals[name] = (before[0] + count, before[1] + total, before[2] + toxic)
    return {
        "rows": sum(statistics.rows for statistics in parts.values()),
        "left_out": dict(left_out),
        "noted": dict(noted),
        "scorers": {
            name: {
                "scored": count,
                "mean_toxicity": total / count if count else None,
                "share_toxic": toxic / count if count else None,
            }
            for name, (count, total, toxic) in totals.items()
        },
    }


def summary_table(summary: dict[str, Any]) -> Table:
    """One line per scorer, with what was left out and noted below."""
    speed = f", {summary['rows_per_s']:,.0f} rows/s" if summary["rows_per_s"] else ""
    remarks = [f"left out: {count:,} {reason}" for reason, count in summary["left_out"].items()]
    remarks += [f"{count:,} {reason}" for reason, count in summary["noted"].items()]
    table = Table(title=f"{summary['rows']:,} rows{speed}", caption="\n".join(remarks) or None)
    table.add_column("scorer", no_wrap=True)
    for column in ("scored", "mean toxicity", "share >= 0.5"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, scores in summary["scorers"].items():
        mean, share = scores["mean_toxicity"], scores["share_toxic"]
        shown = ("-", "-") if mean is None else (f"{mean:.3f}", f"{share:.1%}")
        table.add_row(name, f"{scores['scored']:,}", *shown)
    return table
