"""The metrics that are declared are those that are documented and drawn; the runs of tests/e2e write them."""

import json
import re
from pathlib import Path

import pytest

from detox_ray.metric_names import FAMILIES, JUDGED, TRAINING, TUNING, Metric, gauge_name

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[1]


def documented(heading: str) -> dict[str, Metric]:
    """The tables under a heading of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").replace(r"\|", "\0")
    [section] = re.findall(rf"^## {heading}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    return {name: Metric(unit, meaning.replace("\0", "|")) for name, unit, meaning in rows}


@pytest.mark.parametrize(
    ("heading", "declared"),
    [
        ("Training", TRAINING | {f"{p}/<{f.label}>": f.metric for p, f in FAMILIES.items() if p != "judge"}),
        ("Fine-tuning", TUNING),
        ("The judge while it trains", JUDGED),
    ],
)
def test_the_documentation_is_what_is_declared(heading: str, declared: dict[str, Metric]) -> None:
    assert documented(heading) == declared


def test_the_dashboard_asks_for_what_is_exported() -> None:
    dashboard = json.loads((ROOT / "deployments" / "grafana" / "detox_ray.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(r"ray_detox_ray_\w+", query)}
    names = [*TRAINING, *TUNING, *(family.gauge for family in FAMILIES.values())]
    exported = {f"ray_{gauge_name(name)}" for name in names}
    assert len(queries) > 10
    assert asked
    assert asked <= exported
    assert all(re.findall(r"ray_detox_ray_\w+", query) for query in queries)
