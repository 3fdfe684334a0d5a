"""What the files of a run add to the report: its steps, those that were rejected, the judge's view of it."""

import json

import pytest
from report_folder import edit_evaluation
from report_page import specs

from detox_ray.evaluation.metric_format import TIMES
from detox_ray.evaluation.report import write_report

pytestmark = pytest.mark.unit


def test_metrics_of_a_killed_and_resumed_run(pair, caplog):
    """Step 2 was done twice, a number is NaN, keys are missing, and the last line was cut off."""
    lines = ['{"step": 1, "reward": 0.1}', '{"step": 2, "reward": 9.0}', '{"step": 2, "reward": 0.2}', '{"step": 3}']
    (pair / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "reward": NaN}', '{"step": 5, "rew']))
    (trace,) = specs(write_report(pair).read_text())["reward"]["data"]
    assert (trace["x"], trace["y"]) == ([1, 2], [0.1, 0.2])
    assert "1 lines are not metrics" in caplog.text


def test_rejected_steps_are_said_before_the_table(pair):
    line = {"step": 4, "reason": "the loss is no number", "rate_scale": 0.3, "stopped": False}
    (pair / "rejected_steps.jsonl").write_text(json.dumps(line))
    html = write_report(pair).read_text()
    assert html.index("Step 5 was rejected: the loss is no number.") < html.index("All metrics")
    assert f"learning rates {TIMES}0.3" in (pair / "report.md").read_text()


def test_a_step_that_diverged_twice_stopped_the_run(pair):
    first = {"step": 4, "reason": "the loss is no number", "rate_scale": 0.3, "stopped": False}
    second = first | {"reason": "the KL is above its limit", "stopped": True}
    (pair / "rejected_steps.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    write_report(pair)
    went_on, stopped = (line for line in (pair / "report.md").read_text().splitlines() if "was rejected" in line)
    assert "the loss is no number" in went_on
    assert f"learning rates {TIMES}0.3" in went_on
    assert "the KL is above its limit" in stopped
    assert "stopped there" in stopped
    assert "learning rates" not in stopped


@pytest.mark.parametrize(
    ("file", "called"), [("metrics.jsonl", "held-out prompts"), ("dev_prompts.jsonl", "dev prompts")]
)
def test_prompts_that_chose_the_adapter_are_not_called_held_out(pair, file, called):
    (pair / file).write_text("")
    edit_evaluation(pair, lambda content: content.update(steps=10))
    assert f"on 40 {called}, 5 responses each" in write_report(pair).read_text()


@pytest.mark.parametrize(("late", "warns"), [(0.3, True), (0.1, False)])
def test_reward_hacking_warns_at_the_head_of_the_page(pair, late, warns):
    toxicity = [0.5, 0.44, 0.38, 0.32, 0.3, 0.3] + [0.3 + (late - 0.3) * i / 3 for i in (1, 2, 3)]
    lines = [
        {"step": 10 * i, "mean_toxicity": t, "share_toxic": t, "reward": 0.1 * i, "mean_length": 9}
        for i, t in enumerate(toxicity)
    ]
    (pair / "evaluations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    html = write_report(pair).read_text()
    assert ("Reward hacking?" in html) is warns
    assert ("part ways" in (pair / "report.md").read_text()) is warns
    found = specs(html)
    assert found["evaluated"]["data"][0]["y"] == pytest.approx(toxicity)
    assert {"gap", "evaluated-mean_length"} <= found.keys()
    assert "| 80 | " in (pair / "report.md").read_text()
