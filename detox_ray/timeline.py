"""`detox-ray timeline RUN`: where the learner's time went, step by step, as a Chrome trace."""

import json
from pathlib import Path
from typing import Any

from detox_ray.errors import DataError
from detox_ray.metrics_file import read_metrics, write_atomically
from detox_ray.run_folder import RunFolder

# In the order they follow one another within a step, on the learner's clock. Of a fine-tuning there are the last two.
STAGES = {
    "time_rollout_s": "wait for responses",
    "time_reward_s": "wait for scores",
    "time_learn_s": "learn",
    "time_push_s": "push the adapter",
    "time_dev_s": "dev loss",
}
STEP_TRACK = 0
MICROSECONDS = 1e6


def write_timeline(folder: str | Path, output: Path | None = None) -> Path:
    """Write `RUN/timeline.json`, or `output`: for chrome://tracing or ui.perfetto.dev; returns the file.

    Raises:
        ConfigError: there is no run.
        DataError: it has not finished a step yet.
    """
    run = RunFolder.existing(folder)
    lines = read_metrics(run.metrics_file)
    if not lines:
        raise DataError(f"{run.metrics_file} holds no steps yet; wait for the first one")
    path = output or run.path / "timeline.json"
    write_atomically(path, json.dumps({"traceEvents": trace_events(lines), "displayTimeUnit": "ms"}))
    return path


def trace_events(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A track for whole steps and one for each stage; a step is what its stages took, up to the moment it ended.

    The stages of a step follow one another on the learner's clock, so their lengths and order are all there is to know
    of it. What the workers did meanwhile is not in the metrics.
    """
    stages = [name for name in STAGES if any(name in line for line in lines)]
    tracks = {STEP_TRACK: "step", **{i: STAGES[name] for i, name in enumerate(stages, 1)}}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": track, "args": {"name": name}}
        for track, name in tracks.items()
    ]
    first = lines[0]["ended_at"] - _seconds(lines[0], stages)
    for line in lines:
        start = line["ended_at"] - _seconds(line, stages) - first
        numbers = {name: value for name, value in line.items() if name != "ended_at"}
        events.append(_span(f"step {line['step'] + 1}", STEP_TRACK, start, _seconds(line, stages)) | {"args": numbers})
        for track, name in enumerate(stages, 1):
            events.append(_span(STAGES[name], track, start, line.get(name, 0.0)))
            start += line.get(name, 0.0)
    return events


def _seconds(line: dict[str, Any], stages: list[str]) -> float:
    return sum(line.get(name, 0.0) for name in stages)


def _span(name: str, track: int, start_s: float, length_s: float) -> dict[str, Any]:
    times = {"ts": start_s * MICROSECONDS, "dur": length_s * MICROSECONDS}
    return {"ph": "X", "name": name, "pid": 0, "tid": track, **times}
