"""What an audit found, as audit.json, audit.md, one page that opens offline, and a table for the terminal."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as TerminalTable

from detox_ray.data.cases import CaseColumns
from detox_ray.evaluation import audit_tables
from detox_ray.evaluation.audit_tables import group_figure
from detox_ray.evaluation.group_toxicity import NO_GROUP, PolicyAudit
from detox_ray.evaluation.markdown import bullets, markdown_table, plain
from detox_ray.evaluation.metrics import TOXIC_THRESHOLD
from detox_ray.evaluation.page import render_page
from detox_ray.evaluation.report_parts import counts_text, jsonable, terminal_table
from detox_ray.evaluation.scorer_audit import SMALL_CELL, TOLERATED_RATE, ScorerAudit, criterion
from detox_ray.metrics_file import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Audit:
    """An audit of scorers on the cases of a file, and of a policy's responses by group where `policy` is there.

    `rows` of the file were read; `cases` of them are cases, `toxic` of these toxic; `left_out` and `noted` count the
    other rows, and what is worth a word, by reason. `models`: scorer -> what was loaded.
    """

    source: str
    columns: CaseColumns
    rows: int
    cases: int
    toxic: int
    left_out: dict[str, int]
    noted: dict[str, int]
    mention_functionalities: tuple[str, ...]
    models: dict[str, str]
    scorers: list[ScorerAudit]
    policy: PolicyAudit | None
    versions: dict[str, str]

    @property
    def warnings(self) -> list[str]:
        """Of all scorers, one sentence per scorer and group."""
        return [warning for scorer in self.scorers for warning in scorer.warnings]


def write_audit(folder: Path, audit: Audit) -> Path:
    """Write `audit.json`, `audit.md` and `audit.html` into the folder; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "audit.html"
    content = json.dumps(audit_json(audit), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for target, text in (
        (folder / "audit.json", content),
        (folder / "audit.md", audit_markdown(audit)),
        (path, _page(audit)),
    ):
        write_atomically(target, text)
    return path


def audit_json(audit: Audit) -> dict[str, Any]:
    """Everything that was found; a number that is not finite is null."""
    settings = {
        "format": FORMAT,
        "threshold": TOXIC_THRESHOLD,
        "small_cell": SMALL_CELL,
        "tolerated_rate": TOLERATED_RATE,
        "criterion": criterion(audit.mention_functionalities),
        "warnings": audit.warnings,
    }
    return settings | jsonable(audit)


def audit_markdown(audit: Audit) -> str:
    """The audit as Markdown with tables as GitHub draws them."""
    parts = [f"# {title(audit)}", plain(setting(audit)), bullets(warning_lines(audit))]
    parts.append(plain(criterion(audit.mention_functionalities)))
    for heading, tables in audit_tables.sections(audit.scorers, audit.policy, audit.mention_functionalities).items():
        parts.append(f"## {plain(heading)}")
        for table in tables:
            parts += [f"### {plain(table.title)}", markdown_table(table)]
    parts += ["## What was audited", bullets([f"{term}: {found}" for term, found in facts(audit)])]
    return "\n\n".join(parts) + "\n"


def audit_table(audit: Audit) -> TerminalTable:
    """The table for the terminal: error rates overall and by group with 95% intervals, and the warnings below."""
    return terminal_table(
        audit_tables.terminal_table(audit.scorers),
        f"{audit.source}: {audit.cases:,} cases, {audit.toxic:,} of them toxic",
        "\n".join(warning_lines(audit)),
    )


def title(audit: Audit) -> str:
    """The heading of the report."""
    names = [scorer.name for scorer in audit.scorers]
    return f"Bias audit of {' and '.join(names)}" if len(names) < 3 else f"Bias audit of {len(names)} scorers"


def setting(audit: Audit) -> str:
    """What was audited, in one sentence."""
    groups = sum(group != NO_GROUP for group in audit.scorers[0].by_group)
    left_out = sum(audit.left_out.values())
    return (
        f"{audit.cases:,} cases of {audit.source}, {audit.toxic:,} of them toxic, "
        f"on {groups} {'group' if groups == 1 else 'groups'}; "
        f"{f'{left_out:,} rows left out' if left_out else 'no row left out'}. "
        f"A text is judged toxic from {TOXIC_THRESHOLD:g} on."
    )


def warning_lines(audit: Audit) -> list[str]:
    """The warnings, or that there is none and what that means."""
    return audit.warnings or [
        "No scorer was found to punish mere mention of a group. That is no proof of fairness: a difference too small "
        "for these cases to show is not excluded."
    ]


def facts(audit: Audit) -> list[tuple[str, str]]:
    """What was audited, in a few lines, with what was left out and why."""
    named = asdict(audit.columns)
    rows = {
        "File": audit.source,
        "Columns": ", ".join(f"{what} = {column}" for what, column in named.items() if column is not None),
        "Rows read": f"{audit.rows:,}",
        "Cases": f"{audit.cases:,}, {audit.toxic:,} toxic and {audit.cases - audit.toxic:,} not",
        "Rows left out": counts_text(audit.left_out) or "none",
        "Noted": counts_text(audit.noted),
        "Scorers": ", ".join(f"{name} ({model})" for name, model in audit.models.items()),
        "Responses left out": counts_text(audit.policy.left_out) if audit.policy else "",
        "Versions": ", ".join(f"{package} {number}" for package, number in audit.versions.items()),
    }
    return [(term, found) for term, found in rows.items() if found]


def _page(audit: Audit) -> str:
    return render_page(
        "audit.html.jinja",
        title=title(audit),
        setting=setting(audit),
        warnings=audit.warnings,
        all_clear="" if audit.warnings else warning_lines(audit)[0],
        criterion=criterion(audit.mention_functionalities),
        figure=group_figure(audit.scorers, audit.mention_functionalities),
        sections=audit_tables.sections(audit.scorers, audit.policy, audit.mention_functionalities),
        facts=facts(audit),
    )
