"""`detox-ray timeline RUN`: where the time of each step went, as a Chrome trace: the learner's, and its workers'."""

import json
import logging
from pathlib import Path
from typing import Any

from detox_ray.errors import ConfigError, DataError
from detox_ray.metrics_file import read_metrics, write_atomically
from detox_ray.run_folder import RunFolder

logger = logging.getLogger(__name__)

# In the order they follow one another within a step, on the learner's clock.
STAGES = {
    "time_acknowledge_s": "wait for the adapter before to be acknowledged",
    "time_rollout_s": "wait for responses",
    "time_reward_s": "wait for scores",
    "time_learn_s": "learn",
    "time_push_s": "push the adapter",
    "time_dev_s": "dev loss",
}
LEARNER, WORKERS = 0, 1  # what the trace calls processes
MICROSECONDS = 1e6
TASKS_FILE = "worker_tasks.json"
ROLLOUT_TASK, REPLICA_TASK = "task::RolloutWorker.", "task::ServeReplica:"


def write_timeline(folder: str | Path, output: Path | None = None) -> Path:
    """Write `RUN/timeline.json`, or `output`: for chrome://tracing or ui.perfetto.dev; returns the file.

    Raises:
        ConfigError: there is no run, or the file cannot be written.
        DataError: it has not finished a step yet.
    """
    run = RunFolder.existing(folder)
    lines = read_metrics(run.metrics_file)
    if not lines:
        raise DataError(f"{run.metrics_file} holds no steps yet; wait for the first one")
    first = lines[0]["ended_at"] - sum(_stages(lines[0]).values())
    tasks_file = run.path / TASKS_FILE
    tasks = json.loads(tasks_file.read_text(encoding="utf-8")) if tasks_file.exists() else []
    events = [*learner_events(lines, first), *worker_events(tasks, first)]
    path = output or run.path / "timeline.json"
    try:
        write_atomically(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file with --output") from None
    return path


def keep_worker_tasks(run: RunFolder, app_name: str) -> None:
    """Ask Ray, while it is there, when this job's rollout workers and its reward app's replicas did what."""
    import ray

    job = ray.get_runtime_context().get_job_id()
    try:
        events = ray.timeline()
    except Exception as error:  # nothing of the run depends on it
        logger.warning("the timeline will not show the workers (%s: %s)", type(error).__name__, error)
        return
    own = [
        event
        for event in events
        if (event["cat"].startswith(ROLLOUT_TASK) and event["args"]["task_id"].endswith(job))
        or event["cat"].startswith(f"{REPLICA_TASK}{app_name}:")
    ]
    tasks = [
        {"worker": e["tid"], "task": e["cat"], "start": e["ts"] / MICROSECONDS, "seconds": e["dur"] / MICROSECONDS}
        for e in own
    ]
    write_atomically(run.path / TASKS_FILE, json.dumps(tasks))


def learner_events(lines: list[dict[str, Any]], first: float) -> list[dict[str, Any]]:
    """A track for whole steps and one for each stage, in seconds since `first`.

    Stages follow one another on the learner's clock, up to the moment the step ended.
    """
    stages = [name for name in STAGES if any(name in line for line in lines)]
    tracks = {name: track for track, name in enumerate(stages, 1)}
    events = [_name(LEARNER, None, "learner"), _name(LEARNER, 0, "step")]
    events += [_name(LEARNER, track, STAGES[name]) for name, track in tracks.items()]
    for line in lines:
        seconds = sum(_stages(line).values())
        start = line["ended_at"] - seconds - first
        numbers = {name: value for name, value in line.items() if name != "ended_at"}
        events.append(_span(f"step {line['step'] + 1}", LEARNER, 0, start, seconds) | {"args": numbers})
        for name, length in _stages(line).items():
            events.append(_span(STAGES[name], LEARNER, tracks[name], start, length))
            start += length
    return events


def worker_events(tasks: list[dict[str, Any]], first: float) -> list[dict[str, Any]]:
    """A track for each process of rollout workers and classifiers."""
    tasks = sorted(tasks, key=lambda task: task["start"])
    tracks = {worker: track for track, worker in enumerate(dict.fromkeys(task["worker"] for task in tasks))}
    named = {task["worker"]: task["task"].partition("::")[2].rpartition(".")[0] for task in tasks}
    events = [_name(WORKERS, None, "rollout workers and classifiers")] if tasks else []
    events += [_name(WORKERS, track, named[worker]) for worker, track in tracks.items()]
    for task in tasks:
        name = task["task"].rpartition(".")[2]
        events.append(_span(name, WORKERS, tracks[task["worker"]], task["start"] - first, task["seconds"]))
    return events


def _stages(line: dict[str, Any]) -> dict[str, float]:
    """The seconds of the stages that the step had; the push without that part of it which came first."""
    found = {name: line[name] for name in STAGES if name in line}
    if "time_acknowledge_s" in found:
        found["time_push_s"] -= found["time_acknowledge_s"]
    return found


def _name(process: int, track: int | None, name: str) -> dict[str, Any]:
    kind = {"name": "process_name"} if track is None else {"name": "thread_name", "tid": track}
    return {"ph": "M", "pid": process, **kind, "args": {"name": name}}


def _span(name: str, process: int, track: int, start_s: float, length_s: float) -> dict[str, Any]:
    times = {"ts": start_s * MICROSECONDS, "dur": length_s * MICROSECONDS}
    return {"ph": "X", "name": name, "pid": process, "tid": track, **times}
