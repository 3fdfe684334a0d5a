"""`detox-ray watch RUN`: a run as its folder tells it, from another terminal, while it goes on or afterwards."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from detox_ray.folder_lock import is_in_use
from detox_ray.metrics_file import (
    EVALUATIONS_FILE,
    FAILURE_FILE,
    FINE_TUNING_FILE,
    REJECTED_FILE,
    FollowedFile,
    metrics_line,
)
from detox_ray.run_folder import LOG_FILE, RunFolder

REFRESH_S = 1.0
RECENT = 20  # steps that rate and shares of time are taken over
SILENT_STEPS, SILENCE_S = 10, 60.0  # a run that is silent for so many steps and seconds more may hang
WIDTH = 40  # of a sparkline
BARS = "▁▂▃▄▅▆▇█"
STAGES = {
    "rollout": "time_rollout_s",
    "reward": "time_reward_s",
    "learn": "time_learn_s",
    "push": "time_push_s",
    "dev loss": "time_dev_s",
}
CURVES = (
    ("reward", "reward", "{:+.3f}"),
    ("KL", "kl", "{:.2f} nats per response"),
    ("toxicity", "toxicity", "{:.3f} by the judge, of training responses"),
    ("length", "response_length", "{:.1f} tokens"),
    ("loss", "loss", "{:.3f} nats per token"),
    ("dev loss", "dev_loss", "{:.3f} nats per token"),
)


@dataclass(frozen=True)
class RunView:
    """What there is to see of a run: its steps, how many there will be, and what became of it."""

    name: str
    total_steps: int | None
    running: bool
    state: str
    lines: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    warnings: list[str]

    @property
    def steps(self) -> int:
        """Finished so far."""
        return self.lines[-1]["step"] + 1 if self.lines else 0


class GrowingFiles:
    """What is read of a run's folder, each line once."""

    def __init__(self, run: RunFolder) -> None:
        self.steps = FollowedFile(run.metrics_file, metrics_line)
        self.evaluations = FollowedFile(run.path / EVALUATIONS_FILE, metrics_line)
        self.rejected = FollowedFile(run.path / REJECTED_FILE, metrics_line)
        self.warnings = FollowedFile(run.path / LOG_FILE, _warning)


def watch(folder: str | Path, once: bool = False, console: Console | None = None) -> None:
    """Show the run until it is over or Ctrl-C; with `once`, or where nobody looks on, print it and end.

    Raises:
        ConfigError: there is no run, or its config.yaml is damaged.
    """
    run = RunFolder.existing(folder)
    console = console or Console(highlight=False)
    files = GrowingFiles(run)
    view = look(run, files)
    if once or not console.is_terminal:
        console.print(panel(view, time.time()))
        return
    with Live(panel(view, time.time()), console=console, auto_refresh=False) as live:
        while view.running:
            time.sleep(REFRESH_S)
            view = look(run, files)
            live.update(panel(view, time.time()), refresh=True)


def look(run: RunFolder, files: GrowingFiles) -> RunView:
    """The run as its folder is now."""
    config = run.read_config_tree()
    train = config.get("train")
    running, total_steps = is_in_use(run.path), train.get("total_steps") if isinstance(train, dict) else None
    return RunView(
        name=config.get("name", run.path.name),
        total_steps=total_steps,
        running=running,
        state="running" if running else _end(run, total_steps),
        lines=files.steps.lines(),
        evaluations=files.evaluations.lines(),
        rejected=files.rejected.lines(),
        warnings=files.warnings.lines(),
    )


def panel(view: RunView, now: float) -> Group:
    """Everything, one line a subject."""
    rows = Table.grid(padding=(0, 2))
    rows.add_row("[bold]run[/bold]", f"{escape(view.name)}, {escape(view.state)}")
    rows.add_row("steps", _progress(view))
    if view.lines:
        if view.running:
            rows.add_row("last step", _silence(view, now))
        for label, text in _curves(view):
            rows.add_row(label, text)
        last, recent = view.lines[-1], view.lines[-RECENT:]
        rows.add_row("time", _time_split(recent))
        rows.add_row("speed", f"{sum(line['tokens_per_s'] for line in recent) / len(recent):.0f} tokens/s")
        if "staleness" in last:
            rows.add_row("staleness", f"{last['staleness']} adapter versions; {last['adapter_version']} was sent last")
        if "worker_restarts" in last:
            rows.add_row("workers", _health(int(last["worker_restarts"])))
    if view.rejected:
        evidence = view.rejected[-1]
        text = f"{len(view.rejected)}; step {evidence['step'] + 1}: {evidence['reason']}"
        rows.add_row("rejected", Text(text, style="yellow"))
    texts = [Text(f"  {warning}", style="yellow", overflow="fold") for warning in view.warnings[-3:]]
    return Group(rows, *texts)


def sparkline(values: Sequence[float]) -> str:
    """The values in at most `WIDTH` bars, each a mean of neighbours, from the lowest to the highest."""
    count = min(WIDTH, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in means)


def _curves(view: RunView) -> list[tuple[str, str]]:
    found = [(label, [line[name] for line in view.lines if name in line], form) for label, name, form in CURVES]
    judged = [line["mean_toxicity"] for line in view.evaluations]
    found.append(("judge", judged, "{:.3f} mean toxicity of held-out prompts' responses"))
    return [(label, f"{sparkline(values)}  {form.format(values[-1])}") for label, values, form in found if values]


def _end(run: RunFolder, total_steps: int | None) -> str:
    """What became of a run that nobody works on."""
    if (run.path / FAILURE_FILE).exists():
        return "stopped by an error (failure.json); the same command continues it"
    evaluated = total_steps is not None and run.read_evaluation(total_steps) is not None
    if evaluated or (run.path / FINE_TUNING_FILE).exists():
        return "complete"
    return "stopped; the same command continues it"


def _progress(view: RunView) -> str:
    text = f"{view.steps}/{view.total_steps}" if view.total_steps else f"{view.steps}"
    each = _seconds_a_step(view)
    if each is None:
        return text
    text += f"  {each:.1f} s each"
    if view.total_steps and view.steps < view.total_steps and view.running:
        minutes, seconds = divmod(int((view.total_steps - view.steps) * each), 60)
        text += f", {minutes}:{seconds:02d} left"
    return text


def _silence(view: RunView, now: float) -> str:
    """How long ago the last step ended; in words when that is far longer than steps take."""
    silence = max(0.0, now - view.lines[-1]["ended_at"])
    text = f"{silence:.0f} s ago"
    if view.steps == view.total_steps:
        return f"{text}; what follows is the evaluation"
    if silence > SILENT_STEPS * (_seconds_a_step(view) or 0.0) + SILENCE_S:
        return f"[red]{text}: the run may hang; see run.log and ray-logs in its folder[/red]"
    return text


def _seconds_a_step(view: RunView) -> float | None:
    """From the end of a recent step to that of the next: the median, as one of them may be the gap after a kill."""
    ends = [line["ended_at"] for line in view.lines[-RECENT - 1 :]]
    return statistics.median(b - a for a, b in pairwise(ends)) if len(ends) > 1 else None


def _time_split(lines: list[dict[str, Any]]) -> str:
    sums = {stage: sum(line.get(name, 0.0) for line in lines) for stage, name in STAGES.items()}
    total = sum(sums.values()) or 1.0
    return "  ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in sums.items() if seconds > 0)


def _health(restarts: int) -> str:
    if not restarts:
        return "none was lost"
    return f"[yellow]lost and brought back {restarts} {'time' if restarts == 1 else 'times'}[/yellow]"


def _warning(line: str) -> str | None:
    """What a line of `run.log` warns of: lost workers, evaluations and trackers, rejected steps."""
    return line.strip() if " WARNING " in line or " ERROR " in line else None
