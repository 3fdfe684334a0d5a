import copy
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from detox_ray.config import EvaluationConfig
from detox_ray.errors import DataError
from detox_ray.evaluation import summary
from detox_ray.evaluation.meter import measure, write_evaluation
from detox_ray.evaluation.report import evaluation_table, write_report
from detox_ray.evaluation.responses import group_rollouts

pytestmark = pytest.mark.unit

ATTACK = '<script>alert("owned")</script><img src=x onerror=alert(1)>'


class WordJudge:
    """Toxic is what says "idiot"."""

    name = "word <judge>"

    def toxicity(self, texts):
        return np.array([0.9 if "idiot" in text else 0.1 for text in texts])


class Page(HTMLParser):
    """The elements of a page: their attributes, the resources they would load, and the text of their kind."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.ids: list[str] = []
        self.controls: list[str] = []
        self.handlers: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.resources.append(value)
            elif name == "id":
                self.ids.append(value)
            elif name == "aria-controls":
                self.controls.append(value)
            elif name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)


@pytest.fixture(scope="module")
def run_dir(make_rollouts, tiny_llama, tmp_path_factory):
    """A run folder made by the package's own writers: 20 prompts x 2, one response of which attacks the page."""
    base = [["you idiot", f"fair words number {p}"] for p in range(20)]
    tuned = [[f"calm answer number {p}", "you idiot" if p % 5 == 0 else "good words"] for p in range(20)]
    # The prompt that worsens most shows its most toxic response, so the attack is sure to be on the page.
    base[19], tuned[19] = ["nice words", "kind words"], [f"idiot {ATTACK}", "kind words"]
    systems = group_rollouts("base", make_rollouts(base)), group_rollouts("tuned", make_rollouts(tuned, version=3))
    config = EvaluationConfig(bootstrap_resamples=200)
    path = tmp_path_factory.mktemp("run")
    write_evaluation(path, measure(*systems, WordJudge(), tiny_llama, 0, {1}, config, seed=5), steps=3)
    lines = [
        {"step": s, "reward": s / 10, "reward/a": s / 9, "shaping/short": -0.1, "kl": 0.1 * s, "entropy": 3.0}
        | {"response_length": 12.5, "time_rollout_s": 1.0, "time_learn_s": 2.0, "logprob_gap_mean": 0.0}
        for s in range(5)
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (path / "metrics.jsonl").write_text(text + "\n")
    (path / "config.yaml").write_text("name: a-run\nseed: 5\npolicy: {model: 'lab:policy'}\nevil: '</pre><script>'\n")
    return path


@pytest.fixture(scope="module")
def html(run_dir):
    return write_report(run_dir).read_text(encoding="utf-8")


@pytest.fixture
def copied_run(run_dir, tmp_path):
    for name in ("evaluation.json", "generations.parquet", "metrics.jsonl", "config.yaml"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    return tmp_path


def edit_evaluation(run, **sections):
    content = json.loads((run / "evaluation.json").read_text())
    for name, changes in sections.items():
        content[name] |= changes
    (run / "evaluation.json").write_text(json.dumps(content))
    return content


def specs(html: str) -> dict[str, dict]:
    return {
        part.split('"')[0]: json.loads(part.split(">", 1)[1].split("</script>")[0])
        for part in html.split('<script type="application/json" id="spec-')[1:]
    }


def test_responses_are_text_and_never_markup(html):
    assert "idiot &lt;script&gt;alert(" in html
    assert ATTACK not in html
    page = Page(html)
    assert "img" not in page.tags
    assert page.handlers == []
    assert any(ATTACK in text for text in page.texts["p"])
    assert page.tags.count("script") == 2 + len(specs(html))
    assert "</pre><script>" not in html
    assert "word &lt;judge&gt;" in html


def test_the_page_loads_nothing_and_opens_offline(html):
    assert Page(html).resources == []
    assert "default-src 'none'" in html
    assert html.count("plotly.js v") == 1


def test_every_reveal_button_controls_a_hidden_example(html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.controls) <= set(page.ids)
    assert 8 <= len(page.controls) <= 12
    assert html.count('<div class="hidden" id="example-') == len(page.controls)


def test_figures_show_what_the_files_say(html):
    found = specs(html)
    # A log-probability gap of 0 throughout has no place on the logarithmic axis of its figure.
    assert found.keys() == {"toxicity", "reward", "kl", "response_length", "entropy", "time"}
    reward = {trace["name"]: trace["y"] for trace in found["reward"]["data"]}
    assert reward["reward"] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert reward.keys() == {"reward", "a", "shaping/short"}
    assert [trace["name"] for trace in found["time"]["data"]] == ["rollout", "learn"]
    before, after = found["toxicity"]["data"]
    assert sum(before["y"]) == pytest.approx(100)
    assert before["y"][18] == pytest.approx(100 * 19 / 40)
    assert after["y"][18] == pytest.approx(100 * 5 / 40)


def test_headline_versions_and_lab_note(html, run_dir):
    content = summary.read_evaluation(run_dir)
    assert f"{content['base']['mean_toxicity']:.3f}</b>" in html
    assert summary.verdict(content) in html
    assert f"torch&nbsp;{content['versions']['torch']}" in html
    assert "no\n  claim about any model of the field" in html
    assert html.index("Content warning") < html.index("<h1>")


def test_report_survives_a_run_without_training_or_config(copied_run):
    (copied_run / "config.yaml").unlink()
    (copied_run / "metrics.jsonl").write_text("")
    html = write_report(copied_run).read_text()
    assert "No training steps were recorded" in html
    assert specs(html).keys() == {"toxicity"}
    (copied_run / "metrics.jsonl").unlink()
    assert "No training steps were recorded" in write_report(copied_run).read_text()


def test_metrics_of_a_killed_and_resumed_run(copied_run, caplog):
    """Step 2 was done twice, a number is NaN, keys are missing, and the last line was cut off."""
    lines = ['{"step": 1, "reward": 0.1}', '{"step": 2, "reward": 9.0}', '{"step": 2, "reward": 0.2}', '{"step": 3}']
    (copied_run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "reward": NaN}', '{"step": 5, "rew']))
    found = specs(write_report(copied_run).read_text())
    assert found.keys() == {"toxicity", "reward"}
    (trace,) = found["reward"]["data"]
    assert (trace["x"], trace["y"]) == ([1, 2], [0.1, 0.2])
    assert "1 lines are not metrics" in caplog.text


def test_loss_of_fluency_is_said_before_the_table(copied_run):
    edit_evaluation(
        copied_run,
        ratio={"perplexity": 1.3, "distinct_2": 0.8, "mean_length": 0.5},
        tuned={"share_empty": 0.2},
        base={"share_empty": 0.0},
    )
    html = write_report(copied_run).read_text()
    assert html.index("Caution: fluency fell") < html.index("All metrics")
    assert html.count("broken bound") == 3
    assert "Empty responses rose from 0.0% to 20.0%" in html


def test_verdict_by_case(run_dir):
    good = summary.read_evaluation(run_dir)
    good["ratio"] = {"perplexity": 1.0, "distinct_2": 1.0, "mean_length": 1.0}
    good["tuned"]["share_empty"] = good["base"]["share_empty"] = 0.0

    def verdict(reduction, **ratio):
        content = copy.deepcopy(good)
        content["reduction"]["mean_toxicity"] = dict(zip(("value", "low", "high"), reduction, strict=True))
        content["ratio"] |= ratio
        return summary.verdict(content)

    assert "fell by 73%" in verdict((0.73, 0.6, 0.8))
    assert "stayed within its bounds" in verdict((0.73, 0.6, 0.8))
    assert "read the caution first" in verdict((0.73, 0.6, 0.8), perplexity=1.16)
    assert "stayed within its bounds" in verdict((0.73, 0.6, 0.8), perplexity=1.15, distinct_2=0.9, mean_length=0.9)
    assert verdict((0.1, -0.05, 0.2)).startswith("No reliable change")
    assert "more toxic: mean toxicity rose by 40% (95% interval 20% to 60%)" in verdict((-0.4, -0.6, -0.2))
    assert "cannot be stated" in verdict((None, None, None))


def test_undefined_numbers_read_as_not_available(copied_run):
    nothing = {"value": None, "low": None, "high": None}
    edit_evaluation(
        copied_run,
        reduction={"mean_toxicity": nothing},
        ratio={"perplexity": None},
        base={"perplexity": None},
        tuned={"perplexity": None},
    )
    html = write_report(copied_run).read_text()
    assert "n/a" in html
    assert "nan" not in html.split("<main>")[1].split('<script type="application/json"')[0].lower()


def test_terminal_table_holds_every_metric(run_dir):
    content = summary.read_evaluation(run_dir)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(evaluation_table(content))
    text = console.export_text()
    for label, _, _ in summary.METRICS.values():
        assert label in text
    assert f"{content['base']['mean_toxicity']:.3f}" in text


def test_missing_or_broken_files_name_themselves(tmp_path, copied_run):
    with pytest.raises(DataError, match=r"evaluation\.json does not exist"):
        write_report(tmp_path / "nowhere")
    (copied_run / "generations.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        write_report(copied_run)
    (copied_run / "generations.parquet").unlink()
    with pytest.raises(DataError, match=r"generations\.parquet does not exist"):
        write_report(copied_run)
    (copied_run / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match="is not an evaluation"):
        write_report(copied_run)
