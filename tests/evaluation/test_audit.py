"""An audit from the file to the page, with a real classifier."""

import io
import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import profanity_check
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from detox_ray import cli
from detox_ray.classifier_config import ClassifierConfig
from detox_ray.data.cases import CaseColumns, read_cases
from detox_ray.errors import ConfigError, DataError, ModelError
from detox_ray.evaluation.audit import audit_cases, run_audit
from detox_ray.evaluation.audit_report import audit_table, write_audit
from detox_ray.evaluation.group_toxicity import NO_GROUP
from detox_ray.evaluation.responses import SCHEMA

pytestmark = pytest.mark.unit

COLUMNS = CaseColumns("text", "label", "group")
ATTACK = "<img src=x onerror=alert(1)>|</script>"
PROFANITY = {"name": "profanity", "kind": "linear", "model": "profanity_check:predict_prob", "output": "probability"}


class WordScorer:
    """Toxic is what holds a word."""

    def __init__(self, word: str, name: str = "a scorer") -> None:
        self.name, self._word = name, word

    def score(self, texts):
        return -self.toxicity(texts)

    def toxicity(self, texts):
        return np.array([0.9 if self._word in text else 0.1 for text in texts], dtype=np.float32)


class Page(HTMLParser):
    """What a page would load, what it would run on an event, and its elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.handlers: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.loaded.append(value)
            elif name.startswith("on"):
                self.handlers.append(name)


@pytest.fixture
def case_file(tmp_path):
    """40 neutral cases of three groups, one of them with a hostile name, 40 without a group, and 30 toxic ones."""
    rows = [
        {"text": f"{group} neighbour number {i} waves", "label": "neutral", "group": group}
        for group in ("group-a", "group-b", ATTACK)
        for i in range(40)
    ]
    rows += [{"text": f"the weather of day {i}", "label": "neutral", "group": None} for i in range(40)]
    rows += [{"text": f"you fool number {i}", "label": "toxic", "group": "group-b"} for i in range(30)]
    rows += [{"text": "", "label": "toxic", "group": "group-b"}, {"text": "hm", "label": "maybe", "group": None}]
    path = tmp_path / "cases.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture
def audit(case_file):
    classifiers = [WordScorer("group-a", "biased"), WordScorer("fool", "fair <b>")]
    return audit_cases(read_cases(case_file, COLUMNS), classifiers, "cases.csv", COLUMNS)


def test_a_real_classifier_from_the_file_to_the_page(case_file, tmp_path):
    progress = []
    audit = run_audit(
        case_file,
        [ClassifierConfig(**PROFANITY)],
        tmp_path / "out",
        COLUMNS,
        progress=lambda *step: progress.append(step),
    )
    frame = pd.read_csv(case_file).iloc[:190]
    judged = profanity_check.predict_prob(frame["text"].tolist()) >= 0.5
    toxic = (frame["label"] == "toxic").to_numpy()
    overall = audit.scorers[0].overall
    assert (overall.false_positive.count, overall.false_positive.total) == ((judged & ~toxic).sum(), 160)
    assert (overall.false_negative.count, overall.false_negative.total) == ((~judged & toxic).sum(), 30)
    assert progress == [("profanity", 190, 190)]
    content = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (content["rows"], content["cases"], content["toxic"]) == (192, 190, 30)
    assert content["left_out"] == {"empty text (first in line 192)": 1, "unknown label (first in line 193)": 1}
    assert content["models"] == {"profanity": "profanity_check:predict_prob"}
    assert content["scorers"][0]["overall"]["false_positive"]["total"] == 160
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.html", "audit.json", "audit.md"]


def test_warnings_are_in_every_form(audit, tmp_path):
    (warning,) = audit.warnings
    assert warning == (
        "biased punishes mere mention of group-a: it judges 100.0% of 40 non-toxic cases toxic, reliably more than the "
        "0.0% of 80 non-toxic cases of other groups and the 0.0% of 40 cases without a group."
    )
    html = write_audit(tmp_path, audit).read_text(encoding="utf-8")
    assert f"<li>{warning}</li>" in html
    assert f"- {warning}" in (tmp_path / "audit.md").read_text()
    assert json.loads((tmp_path / "audit.json").read_text())["warnings"] == [warning]
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(audit_table(audit))
    shown = console.export_text()
    assert "biased punishes mere mention of group-a" in shown
    # 40 of 160 non-toxic cases.
    assert "25.0%" in next(line for line in shown.splitlines() if "all cases" in line)


def test_the_page_is_self_contained_and_names_are_text(audit, tmp_path):
    html = write_audit(tmp_path, audit).read_text(encoding="utf-8")
    page = Page(html)
    assert page.loaded == []
    assert page.handlers == []
    assert "img" not in page.tags
    assert "&lt;img src=x" in html
    assert "fair &lt;b&gt;" in html
    ours, _, rest = html.partition("<script>/**")
    assert "://" not in ours + rest.rpartition("</script>\n<script>")[2]
    assert "default-src 'none'" in ours
    assert html.index("Content warning") < html.index("<h1>")
    # A case's text stands nowhere.
    assert "neighbour number" not in html
    assert "fool number" not in html
    spec = json.loads(html.split('id="spec-mentions">')[1].split("</script>")[0])
    assert [trace["name"] for trace in spec["data"]] == ["biased", "fair &lt;b&gt;"]
    assert max(spec["data"][0]["x"]) == 100
    # The | in a name does not end a cell of the Markdown table.
    table = [line for line in (tmp_path / "audit.md").read_text().splitlines() if "&lt;img" in line]
    assert table
    assert all("\\|" in line for line in table)


def test_small_cells_are_marked(tmp_path):
    path = tmp_path / "cases.csv"
    rows = [("group-a", i) for i in range(25)] + [("group-b", i) for i in range(3)]
    pd.DataFrame([{"text": f"{g} {i}", "label": 0, "group": g} for g, i in rows]).to_csv(path, index=False)
    write_audit(tmp_path, audit_cases(read_cases(path, COLUMNS), [WordScorer("none")], "cases.csv", COLUMNS))
    lines = (tmp_path / "audit.md").read_text().splitlines()
    assert all("of 3\\*" in line for line in lines if line.startswith("| group-b"))
    assert all("of 25" in line and "\\*" not in line for line in lines if line.startswith("| group-a"))
    assert any("fewer than 20" in line for line in lines)


def test_a_policy_is_audited_by_group(case_file, tmp_path):
    rows = [
        dict.fromkeys(SCHEMA.names)
        | {"system": system, "prompt_id": f"p{i}", "group": "group-a" if i % 2 else None, "toxicity": toxicity}
        | {"prompt": "", "response": "", "sample": 0, "finish_reason": "", "tokens": 1, "adapter_version": 0}
        | {"response_ids": []}
        for system, toxicity in (("base", 0.75), ("tuned", 0.125))
        for i in range(50)
    ]
    generations = tmp_path / "generations.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), generations)
    scorers = [ClassifierConfig(**PROFANITY)]
    audit = run_audit(case_file, scorers, tmp_path / "out", COLUMNS, generations=generations)
    found = [(row.system, row.group, row.prompts, row.mean_toxicity.value) for row in audit.policy.rows]
    assert found == [
        *(("base", "group-a", 25, 0.75), ("base", NO_GROUP, 25, 0.75)),
        *(("tuned", "group-a", 25, 0.125), ("tuned", NO_GROUP, 25, 0.125)),
    ]
    assert "Responses to prompts that mention a group" in (tmp_path / "out" / "audit.html").read_text()
    assert "| tuned: group-a | 25 | 25 | 0.125 (0.125 to 0.125) |" in (tmp_path / "out" / "audit.md").read_text()


def test_checks_come_before_a_classifier_is_loaded(case_file, tmp_path, monkeypatch):
    def loaded(config):
        raise AssertionError("a classifier was loaded")

    monkeypatch.setattr("detox_ray.evaluation.audit.load_classifier", loaded)
    good = ClassifierConfig(**PROFANITY)
    bad = ClassifierConfig(name="bad", kind="transformers", model=str(tmp_path / "none"))
    out = tmp_path / "out"
    with pytest.raises(DataError, match="does not exist"):
        run_audit(tmp_path / "none.csv", [good], out, COLUMNS)
    with pytest.raises(DataError, match="no column 'test_case'"):
        run_audit(case_file, [good], out)
    with pytest.raises(DataError, match=r"generations\.parquet does not exist"):
        run_audit(case_file, [good], out, COLUMNS, generations=tmp_path / "generations.parquet")
    with pytest.raises(ModelError, match="classifier 'bad'"):
        run_audit(case_file, [good, bad], out, COLUMNS)
    with pytest.raises(ConfigError, match="two scorers are called 'profanity'"):
        run_audit(case_file, [good, good], out, COLUMNS)
    with pytest.raises(ConfigError, match="no scorers"):
        run_audit(case_file, [], out, COLUMNS)
    assert not out.exists()


def test_the_command_on_a_file_of_other_columns_and_labels(tmp_path, monkeypatch, capsys):
    cases = tmp_path / "cases.csv"
    cases.write_text("comment,verdict,about\nyou damn fool,rude,group-a\nyou friend,civil,group-b\n")
    scorers = tmp_path / "scorers.yaml"
    scorers.write_text(f"systems: [{{name: none, responses: none.csv}}]\nscorers: {json.dumps([PROFANITY])}\n")
    columns = ["--text-column=comment", "--label-column=verdict", "--group-column=about"]
    labels = ["--toxic-label=rude", "--nontoxic-label=civil"]
    command = ["detox-ray", "audit", str(cases), f"--config={scorers}", f"--output={tmp_path / 'audit'}"]
    monkeypatch.setattr("sys.argv", [*command, *columns])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "--toxic-label and --nontoxic-label" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr("sys.argv", [*command, *columns, *labels])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["cases"] == 2


def test_real_hatecheck_by_pandas(shared, tmp_path):
    path = shared / "data" / "hatecheck" / "test_suite_cases.csv"
    audit = run_audit(path, [ClassifierConfig(**PROFANITY)], tmp_path)
    frame = pd.read_csv(path)
    frame["judged"] = profanity_check.predict_prob(frame["test_case"].tolist()) >= 0.5
    mentions = frame[frame["functionality"].isin(["ident_neutral_nh", "ident_pos_nh"])]
    expected = mentions.groupby("target_ident")["judged"].agg(["sum", "count"])
    found = {mention.group: (mention.rate.count, mention.rate.total) for mention in audit.scorers[0].mentions}
    assert found == {group: tuple(row) for group, row in expected.iterrows()}
    hateful = frame[frame["label_gold"] == "hateful"]
    missed = (~hateful["judged"]).groupby(hateful["functionality"]).agg(["sum", "count"])
    cells = {name: cell.false_negative for name, cell in audit.scorers[0].by_functionality.items()}
    assert {name: (c.count, c.total) for name, c in cells.items() if c} == {n: tuple(r) for n, r in missed.iterrows()}
