"""Files of a run that are read while they grow."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from detox_ray import metrics_file
from detox_ray.metrics_file import FollowedFile, append_metrics, cut_metrics, metrics_line
from detox_ray.terminal import Terminal

pytestmark = pytest.mark.unit


def test_a_followed_file_is_read_on_from_where_the_last_look_ended(tmp_path: Path) -> None:
    path, asked = tmp_path / "metrics.jsonl", list[str]()

    def parse(text: str) -> dict | None:
        asked.append(text)
        return metrics_line(text)

    followed = FollowedFile(path, parse)
    assert followed.lines() == []
    append_metrics(path, {"step": 0})
    with path.open("ab") as file:
        file.write('{"step": 1, "of": "\u00e9'.encode()[:-1])
    assert followed.lines() == followed.lines() == [{"step": 0}]
    with path.open("ab") as file:
        file.write('\u00e9"}\nno line of ours\n'.encode()[1:])
    assert followed.lines() == followed.lines() == [{"step": 0}, {"step": 1, "of": "\u00e9"}]
    assert len(asked) == 3


def test_a_followed_file_that_a_resumed_run_has_cut_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    followed = FollowedFile(path, metrics_line)
    for step in range(3):
        append_metrics(path, {"step": step, "run": "before"})
    assert len(followed.lines()) == 3
    cut_metrics(path, first_step=1)
    for step in range(1, 5):  # longer than it was, before anybody looks
        append_metrics(path, {"step": step, "run": "after"})
    assert [line["step"] for line in followed.lines()] == [0, 1, 2, 3, 4]
    assert [line["run"] for line in followed.lines()] == ["before", *4 * ["after"]]
    with path.open("r+") as file:
        file.truncate(0)
    assert followed.lines() == []


def test_the_terminal_reads_no_line_of_a_long_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "metrics.jsonl", list[int]()
    for step in range(100):
        append_metrics(path, {"step": step})
    loads = metrics_file.json.loads
    monkeypatch.setattr(metrics_file.json, "loads", lambda text: read.append(0) or loads(text))
    monkeypatch.setattr("detox_ray.terminal.POLL_S", 0.01)
    terminal, out = Terminal(), io.StringIO()
    terminal.console = Console(file=out)
    with terminal.follow_steps(path, 101, lambda line, total: f"step {line['step']}"):
        while len(read) < 100:
            time.sleep(0.01)
        append_metrics(path, {"step": 100})
    assert len(read) == 101
    assert [line for line in out.getvalue().splitlines() if "step" in line] == [f"step {i}" for i in range(101)]
