"""What the terminal view and the timeline say of a run folder."""

import fcntl
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group

from detox_ray.run_folder import RunFolder
from detox_ray.timeline import write_timeline
from detox_ray.watch import GrowingFiles, RunView, look, panel, sparkline

pytestmark = pytest.mark.unit
TIMES = {"time_rollout_s": 1.0, "time_reward_s": 0.5, "time_learn_s": 2.0, "time_push_s": 0.5, "time_step_s": 4.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three of ten steps, one every five seconds; a lost worker, a rejected step and what the judge saw."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: mine\nreward: {}\ntrain: {total_steps: 10}\n")
    lines: list[dict[str, Any]] = [
        {"step": i, "reward": 0.1 * i, "kl": 0.2, "response_length": 12.0, "tokens_per_s": 100.0, "staleness": 1,
         "adapter_version": i + 1, "worker_restarts": min(i, 1), "ended_at": 1000.0 + 5 * i, **TIMES}
        for i in range(3)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluations.jsonl").write_text(json.dumps({"step": 1, "mean_toxicity": 0.25}) + "\n")
    (folder / "rejected_steps.jsonl").write_text(json.dumps({"step": 2, "reason": "KL is 99"}) + "\n")
    lost = "2026-01-01 12:00:00,000 WARNING detox_ray.rollout.pool: rollout worker 1 is lost (RayActorError); waiting"
    (folder / "run.log").write_text(f"2026-01-01 11:59:59,000 INFO detox_ray: started\n{lost}\n")
    return folder


def printed(content: Group) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(content)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def looked_at(folder: Path) -> RunView:
    run = RunFolder.existing(folder)
    return look(run, GrowingFiles(run))


def seen(folder: Path) -> str:
    return printed(panel(looked_at(folder), now=0.0))


def test_a_configuration_that_is_damaged(run: Path, refused_line: Callable[..., str]) -> None:
    for train in ("", "[1]"):
        (run / "config.yaml").write_text(f"name: mine\ntrain: {train}\n")
        assert "  3  5.0 s each" in seen(run)
    (run / "config.yaml").write_text("name: [mine")
    assert "config.yaml is not YAML" in refused_line("watch", str(run))


def test_a_timeline_that_cannot_be_written(run: Path, refused_line: Callable[..., str]) -> None:
    line = refused_line("timeline", str(run), "--output", "/no/such/folder/t.json")
    assert "/no/such/folder/t.json cannot be written (No such file or directory); name another file" in line


def test_a_run_that_stopped(run: Path) -> None:
    text = seen(run)
    assert "mine, stopped; the same command continues it" in text
    assert "3/10  5.0 s each" in text
    assert "▁▅█  +0.200" in text
    assert "rollout 25%  reward 12%  learn 50%  push 12%" in text
    assert "1 adapter versions; 3 was sent last" in text
    assert "lost and brought back 1 time" in text
    assert "▁  0.250 mean toxicity of held-out" in text
    assert "1; step 3: KL is 99" in text
    assert "rollout worker 1 is lost (RayActorError)" in text
    assert "INFO" not in text


def test_a_run_that_goes_on_and_one_that_is_complete(run: Path) -> None:
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = seen(run)
        assert "mine, running" in text
        assert "5.0 s each, 0:35 left" in text
    (run / "report.html").touch()
    (run / "evaluation.json").write_text('{"steps": 2}')  # evaluated by hand, half way
    assert "mine, stopped" in seen(run)
    (run / "evaluation.json").write_text('{"steps": 10}')
    assert "mine, complete" in seen(run)
    (run / "failure.json").touch()
    assert "stopped by an error" in seen(run)


def test_a_run_that_hangs_is_told_from_one_that_works_and_one_that_evaluates(run: Path) -> None:
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        view = looked_at(run)
        assert "100 s ago\n" in printed(panel(view, now=1110.0))
        assert "190 s ago: the run may hang; see run.log" in printed(panel(view, now=1200.0))
        done = replace(view, total_steps=3)
        assert "190 s ago; what follows is the evaluation" in printed(panel(done, now=1200.0))


def test_a_run_without_steps(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert "0/10" in seen(run)


def test_a_sparkline_shows_lowest_and_highest_and_stays_short() -> None:
    assert sparkline([0, 7, 3.5]) == "▁█▅"
    assert sparkline([2, 2]) == "▁▁"
    assert len(sparkline(list(range(1000)))) == 40
    assert sparkline(list(range(1000)))[0] + sparkline(list(range(1000)))[-1] == "▁█"


def test_the_timeline_lays_each_steps_stages_end_to_end_up_to_the_moment_it_ended(run: Path) -> None:
    tasks = [
        {"worker": "w1", "task": "task::RolloutWorker.generate", "start": 996.5, "seconds": 0.25},
        {"worker": "w2", "task": "task::ServeReplica:app:classifier-a.score", "start": 996.75, "seconds": 0.5},
        {"worker": "w1", "task": "task::RolloutWorker.apply", "start": 999.5, "seconds": 0.5},
    ]
    (run / "worker_tasks.json").write_text(json.dumps(tasks))
    events = json.loads(write_timeline(run).read_text())["traceEvents"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {
        (0, None): "learner", (0, 0): "step", (0, 1): "wait for responses", (0, 2): "wait for scores", (0, 3): "learn",
        (0, 4): "push the adapter", (1, None): "rollout workers and classifiers", (1, 0): "RolloutWorker",
        (1, 1): "ServeReplica:app:classifier-a",
    }  # fmt: skip
    spans = [(e["name"], e["pid"], e["tid"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events if e["ph"] == "X"]
    assert spans[:6] == [
        ("step 1", 0, 0, 0.0, 4.0),
        ("wait for responses", 0, 1, 0.0, 1.0),
        ("wait for scores", 0, 2, 1.0, 0.5),
        ("learn", 0, 3, 1.5, 2.0),
        ("push the adapter", 0, 4, 3.5, 0.5),
        ("step 2", 0, 0, 5.0, 4.0),
    ]
    assert spans[-3:] == [("generate", 1, 0, 0.5, 0.25), ("score", 1, 1, 0.75, 0.5), ("apply", 1, 0, 3.5, 0.5)]


def test_refusals(run: Path, tmp_path: Path, refused_line: Callable[..., str]) -> None:
    assert "is no run folder" in refused_line("watch", str(tmp_path))
    (run / "metrics.jsonl").unlink()
    assert "holds no steps yet" in refused_line("timeline", str(run))
