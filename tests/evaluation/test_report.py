import re

import numpy as np
import pytest
from report_folder import (
    ATTACK,
    JUDGE,
    OTHER,
    SYSTEMS,
    add_training,
    attacked,
    edit_evaluation,
    interval,
    read_rows,
    write_folder,
    write_rows,
)
from report_page import Page, specs, visible

from detox_ray.errors import DataError
from detox_ray.evaluation.comparison import EvaluationProtocol, compare, write_evaluation
from detox_ray.evaluation.evaluation_file import read_evaluation
from detox_ray.evaluation.metric_format import TIMES, format_percent_change, format_value
from detox_ray.evaluation.paired_responses import bucket_flows, read_paired_responses
from detox_ray.evaluation.report import write_report
from detox_ray.evaluation.responses import ScoredResponses, group_rollouts
from detox_ray.evaluation.summary import verdict
from detox_ray.records import Prompt

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run folder of two systems, with training curves, a configuration, and a response that attacks the page."""
    return add_training(attacked(write_folder(tmp_path_factory.mktemp("run"), ("base", "tuned"))))


@pytest.fixture(scope="module")
def html(run_dir):
    return write_report(run_dir).read_text(encoding="utf-8")


def test_responses_are_text_and_never_markup(html):
    assert "fool &lt;script&gt;alert(" in html
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
    own = html.replace(html[html.index("/**\n* plotly.js") : html.index('"use strict";\nconst page')], "")
    assert "//" not in re.sub(r"^\s*//.*$", "", own, flags=re.MULTILINE)
    assert len(html.encode()) < 6_000_000


def test_every_reveal_button_controls_a_hidden_example(html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.controls) <= set(page.ids)
    assert 8 <= len(page.controls) <= 16
    assert html.count('class="hidden" id=') == len(page.controls)


def test_figures_show_what_the_files_say(html, run_dir):
    found = specs(html)
    # A log-probability gap of 0 throughout has no place on the logarithmic axis of its figure.
    assert found.keys() == {
        *("flows", "perplexity", "toxicity"),
        *("reward", "kl", "response_length", "entropy", "time"),
    }
    reward = {trace["name"]: trace["y"] for trace in found["reward"]["data"]}
    assert reward["reward"] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert reward.keys() == {"reward", "a", "shaping/short"}
    assert [trace["name"] for trace in found["time"]["data"]] == ["rollout", "learn"]
    rows = read_rows(run_dir)
    for trace, system in zip(found["toxicity"]["data"], ("base", "tuned"), strict=True):
        scores = [row["toxicity"] for row in rows if row["system"] == system]
        assert trace["y"][0] == pytest.approx(100 * sum(score < 0.05 for score in scores) / len(scores))


def test_headline_versions_and_lab_note(html, run_dir):
    content = read_evaluation(run_dir)
    base, tuned = (content["systems"][name]["all"]["mean_toxicity"]["value"] for name in ("base", "tuned"))
    assert f'{base:.3f}</b><span class="arrow"' in html
    assert f"{tuned:.3f}</b></p>" in html
    assert verdict(content, "tuned") in html
    assert f"torch&nbsp;{content['versions']['torch']}" in html
    assert "no\n  claim about any model of the field" in html
    assert html.index("Content warning") < html.index("<h1>")


def test_page_and_twin_hold_every_number_of_evaluation_json(tmp_path):
    folder = write_folder(tmp_path)
    page = visible(write_report(folder).read_text())
    twin = (folder / "report.md").read_text()
    content = read_evaluation(folder)
    for system in SYSTEMS:
        for split, metrics in content["systems"][system].items():
            for name, found in metrics.items():
                value, low, high = (format_value(name, found[end]) for end in ("value", "low", "high"))
                assert f"{value} {low} to {high}" in page, (system, split, name)
                assert f"{value} ({low} to {high})" in twin, (system, split, name)
    for system in SYSTEMS[1:]:
        for split, comparison in content["comparisons"][system].items():
            for name, found in comparison["reduction"].items():
                value, high, low = (format_percent_change(found[end]) for end in ("value", "high", "low"))
                assert f"{value} ({high} to {low})" in page, (system, split, name)
                assert f"{value} ({high} to {low})" in twin, (system, split, name)
            for found in comparison["ratio"].values():
                assert f"{TIMES}{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})" in twin
    for scorer in (JUDGE, OTHER):
        for system in SYSTEMS:
            found = content["by_scorer"][scorer][system]["all"]["mean_toxicity"]
            assert f"{found['value']:.3f} {found['low']:.3f} to {found['high']:.3f}" in page
    assert "second-opinion 0.83 1.00" in page
    assert "| second-opinion | 0.83 | 1.00 |" in twin


def test_what_the_meter_writes_is_shown(make_rollouts, tmp_path):
    """Of the package's own writers, three systems of 12 prompts x 2, two scorers, no perplexity."""
    prompts = [Prompt(f"p{i}", f"prompt number {i}", (), {"toxicity": i / 12}) for i in range(12)]
    systems = []
    for name, rude in (("base", 12), ("sft", 6), ("rlaf", 2)):
        texts = [["you fool" if i < rude else "a kind word", "all is well"] for i in range(12)]
        responses = group_rollouts(name, make_rollouts(texts), prompts)
        toxicity = np.array([[0.9 if "fool" in text else 0.1 for text in of_prompt] for of_prompt in texts])
        systems.append(ScoredResponses(responses, {JUDGE: toxicity, OTHER: toxicity / 2}))
    evaluation = compare(systems, EvaluationProtocol([JUDGE, OTHER], seed=1, resamples=200))
    write_evaluation(tmp_path, evaluation, systems)
    text = visible(write_report(tmp_path).read_text())
    for system, share in (("base", "50.0%"), ("sft", "25.0%"), ("rlaf", "8.3%")):
        assert f"{system} {evaluation['systems'][system]['all']['mean_toxicity']['value']:.3f}" in text
        assert f" {share} " in text
    # JUDGE puts 12 of 24 responses of the base above 0.5, OTHER none.
    assert "| base | 50.0% |" in (tmp_path / "report.md").read_text()
    assert "| high under base | 6 | 0 | 6 |" in (tmp_path / "report.md").read_text()


def test_reductions_and_flows_as_counted_from_the_files(tmp_path):
    folder = write_folder(tmp_path)
    write_report(folder)
    twin, content = (folder / "report.md").read_text(), read_evaluation(folder)
    for split in ("all", "toxic"):
        rlaf = content["comparisons"]["rlaf"][split]["reduction"]
        row = next(
            line
            for line in twin.split("## Reductions")[1].split(f"### {split.title()} prompts")[1].splitlines()
            if line.startswith("| rlaf")
        )
        for name in ("mean_toxicity", "share_toxic"):
            assert f" {rlaf[name]['value']:.0%} ({rlaf[name]['low']:.0%} to" in row
    responses = read_paired_responses(folder / "generations.parquet", list(SYSTEMS))
    low_to = bucket_flows(responses.toxicity[0], responses.toxicity[1])[0]
    assert f"| low under base | {low_to[0]} | {low_to[1]} | {low_to[2]} |" in twin
    rows = read_rows(folder)
    split_sides = sum((r[f"toxicity/{JUDGE}"] >= 0.5) != (r[f"toxicity/{OTHER}"] >= 0.5) for r in rows[:200])
    assert f"| base | {split_sides / 200:.1%} |" in twin


def test_a_single_system(tmp_path):
    folder = write_folder(tmp_path, ("base",))
    html = write_report(folder).read_text()
    assert specs(html).keys() == {"toxicity"}
    assert "before" not in visible(html).split("What was run")[0].lower()
    assert "Nothing was compared with it" in html
    assert Page(html).controls == []
    assert "## Pairs" not in (folder / "report.md").read_text()
    assert "how toxic, not whether that is less than before" in (folder / "model_card.md").read_text()


def test_many_systems(tmp_path):
    names = ("base", *(f"system {n}" for n in range(9)))
    html = write_report(write_folder(tmp_path, names)).read_text()
    headings = [text for text in Page(html).texts["h2"] if text in names]
    assert headings == list(names[1:])
    assert [trace["name"] for trace in specs(html)["perplexity"]["data"]] == list(names)
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))


def test_report_survives_a_run_without_training_or_config(run_dir, tmp_path):
    for name in ("evaluation.json", "generations.parquet"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    assert "No training steps were recorded" in write_report(tmp_path).read_text()
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "evaluations.jsonl").write_text("")
    html = write_report(tmp_path).read_text()
    assert "No training steps were recorded" in html
    assert specs(html).keys() == {"flows", "perplexity", "toxicity"}


def test_small_print_says_how_intervals_were_made(pair):
    assert "of distinct-1, -2 and -3 by jackknife" in write_report(pair).read_text()


def test_loss_of_fluency_is_said_before_the_table(pair):
    def lose(content):
        content["comparisons"]["tuned"]["all"]["ratio"] = {
            name: interval(ratio) for name, ratio in (("perplexity", 1.3), ("distinct_2", 0.8), ("mean_length", 0.5))
        }
        content["systems"]["tuned"]["all"]["share_empty"] = interval(0.2)

    edit_evaluation(pair, lose)
    html = write_report(pair).read_text()
    assert html.index("<strong>Caution</strong>") < html.index("All metrics")
    assert html.count("broken bound") == 3
    for text in (html, (pair / "report.md").read_text(), (pair / "model_card.md").read_text()):
        assert "Empty responses rose from 0.0% to 20.0%" in text


def test_undefined_numbers_read_as_not_available(pair):
    nothing = {"value": None, "low": None, "high": None}

    def undefine(content):
        content["comparisons"]["tuned"]["all"]["reduction"]["mean_toxicity"] = nothing
        content["comparisons"]["tuned"]["all"]["ratio"]["perplexity"] = nothing
        content["comparisons"]["tuned"]["all"]["p_value"] = None
        content["agreement"][JUDGE][OTHER] = content["agreement"][OTHER][JUDGE] = None
        for system in content["systems"].values():
            system["all"]["perplexity"] = system["all"]["std_toxicity"] = nothing
        for by_system in content["by_scorer"].values():
            by_system["base"]["all"]["mean_toxicity"] = nothing

    edit_evaluation(pair, undefine)
    rows = read_rows(pair)
    for row in rows[::3]:
        row[f"toxicity/{OTHER}"] = None
    for row in rows:
        row["prompt_toxicity"] = row["nll"] = None
    write_rows(pair, rows)
    text = visible(write_report(pair).read_text())
    assert "n/a" in text
    assert not re.search(r"\b(nan|None|inf)\b", text + (pair / "report.md").read_text())


def test_metrics_that_were_not_measured_have_no_row(pair):
    def forget(content):
        for system in content["systems"].values():
            for metrics in system.values():
                del metrics["perplexity"]
        for split in content["comparisons"]["tuned"].values():
            del split["ratio"]["perplexity"]
        for key in ("perplexity_model", "by_scorer", "agreement", "versions", "splits"):
            del content[key]

    edit_evaluation(pair, forget)
    html = write_report(pair).read_text()
    assert "Perplexity" not in visible(html)
    assert "perplexity" not in specs(html)


def test_wide_and_long_texts_stay_small(pair):
    rows = read_rows(pair)
    for row in rows:
        row["response"] = "W" * 100_000
    write_rows(pair, rows)
    html = write_report(pair).read_text()
    assert len(html.encode()) < 6_000_000
    assert "(98,000 more characters)" in html


def test_rewards_of_the_file_stand_in_the_pairs(pair):
    rows = read_rows(pair)
    for row in rows:
        row["reward"] = 2.25 if row["system"] == "base" else 5.5
    write_rows(pair, rows)
    text = visible(write_report(pair).read_text())
    assert "All 200 pairs: mean reward 2.250 before, 5.500 after, difference +3.250" in text
    assert "2.250 5.500 +3.250" in text


def test_improvement_of_mean_and_std_by_hand(pair):
    def simple(content):
        for system, mean, std in (("base", 0.4, 0.2), ("tuned", 0.1, 0.05)):
            metrics = content["systems"][system]["all"]
            metrics["mean_toxicity"], metrics["std_toxicity"] = interval(mean), interval(std)

    edit_evaluation(pair, simple)
    assert "Improvement of toxicity: mean 75.0%, std 75.0%." in visible(write_report(pair).read_text())


def test_model_card_says_what_was_done_and_leaves_the_licence(run_dir, html):
    card = (run_dir / "model_card.md").read_text()
    assert "**Base model:** lab:policy" in card
    assert "reward from a, b (min)" in card
    assert "was not in the reward" in card
    assert "### Licence\n\n<!-- Fill in" in card
    content = read_evaluation(run_dir)
    found = content["systems"]["tuned"]["all"]["mean_toxicity"]
    assert f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})" in card
    assert "word &lt;judge&gt;" in card
    assert "&lt;!-- Fill in" in html


def test_paths_of_this_machine_are_not_published(pair):
    (pair / "config.yaml").write_text(
        "policy: {model: /home/somebody/models/small}\nreward: {classifiers: [{name: a}]}\n"
        "data: {source: /home/somebody/prompts.jsonl}\n"
    )
    edit_evaluation(pair, lambda content: content.update(perplexity_model="/home/somebody/cache/large"))
    write_report(pair)
    for name in ("model_card.md", "report.md"):
        text = (pair / name).read_text()
        assert "somebody" not in text
        assert "prompts.jsonl" in text
        assert "Perplexity under large." in text
    assert "**Base model:** small" in (pair / "model_card.md").read_text()


def test_a_judge_in_the_reward_is_not_called_independent(run_dir, tmp_path):
    for file in run_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_evaluation(tmp_path, lambda content: content.update(judge="a"))
    html = write_report(tmp_path).read_text()
    assert "not in the reward" not in html
    assert "not in the reward" not in (tmp_path / "model_card.md").read_text()


def test_names_are_no_markup_of_markdown(tmp_path):
    folder = write_folder(tmp_path, ("base", "a|b <i>[x](y)"))
    write_report(folder)
    assert "a\\|b &lt;i&gt;\\[x\\](y)" in (folder / "report.md").read_text()


def test_texts_of_the_responses_are_neither_in_the_twin_nor_in_the_log(run_dir, html, caplog):
    write_report(run_dir)
    assert "you fool" not in (run_dir / "report.md").read_text()
    assert "fool" not in caplog.text


def test_missing_or_broken_files_name_themselves(tmp_path, pair):
    with pytest.raises(DataError, match=r"evaluation\.json does not exist"):
        write_report(tmp_path / "nowhere")
    rows = read_rows(pair)
    write_rows(pair, [row for row in rows if row["system"] == "base"])
    with pytest.raises(DataError, match="holds no responses of 'tuned'"):
        write_report(pair)
    write_rows(pair, rows[:-1])
    with pytest.raises(DataError, match="responses of 'base' and 'tuned' to the same prompts"):
        write_report(pair)
    (pair / "generations.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        write_report(pair)
    (pair / "generations.parquet").unlink()
    with pytest.raises(DataError, match=r"generations\.parquet does not exist"):
        write_report(pair)
    edit_evaluation(pair, lambda content: content.pop("format"))
    with pytest.raises(DataError, match="evaluate again"):
        write_report(pair)
