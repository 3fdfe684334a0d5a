"""The report on an evaluation folder, from its files without any model: a page, its Markdown twin, a model card."""

from pathlib import Path

from detox_ray.evaluation.content import ReportContent, gather
from detox_ray.evaluation.markdown import markdown_report
from detox_ray.evaluation.model_card import model_card
from detox_ray.evaluation.page import render_page
from detox_ray.metrics_file import write_atomically


def write_report(folder: Path) -> Path:
    """Write `report.html`, `report.md` and `model_card.md` from evaluation.json and generations.parquet.

    metrics.jsonl, evaluations.jsonl, config.yaml and analysis.json add their parts where they are there. Returns the
    path of the page, which is one file that opens offline.

    Raises:
        DataError: the evaluation or the generations are missing, unreadable or of an older version.
    """
    content = gather(folder)
    card = model_card(content)
    path = folder / "report.html"
    # Half of a surrogate pair, which JSON lets through, has no place in UTF-8.
    for target, text in (
        (folder / "report.md", markdown_report(content)),
        (folder / "model_card.md", card),
        (path, _page(content, card)),
    ):
        write_atomically(target, text.encode("utf-8", errors="replace").decode("utf-8"))
    return path


def _page(content: ReportContent, card: str) -> str:
    return render_page(
        "report.html.jinja",
        report=content,
        model_card=card,
    )
