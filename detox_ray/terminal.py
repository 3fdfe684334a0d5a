"""What a run shows while it runs: stages, one line per step, progress bars."""

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from detox_ray.config_section import S
from detox_ray.data.lab import lab_folder, resolve_lab, uses_lab
from detox_ray.metrics_file import FollowedFile, metrics_line

POLL_S = 0.5


class Terminal:
    """Prints to a console; with `quiet` to nowhere."""

    def __init__(self, quiet: bool = False) -> None:
        quieten_libraries()
        self.console = Console(quiet=quiet, highlight=False)
        self._started = time.monotonic()

    def stage(self, text: str) -> None:
        """A line that says what happens now, with the minutes since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        self.console.print(f"[dim]{minutes:2d}:{seconds:02d}[/dim] {escape(text)}", soft_wrap=True)

    @contextmanager
    def bar(self, description: str, total: float) -> Iterator[Callable[[float], None]]:
        """A progress bar; yields a function that sets how much is done."""
        with self._progress() as progress:
            task = progress.add_task(description, total=total)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def follow_steps(
        self, metrics_file: Path, total_steps: int, line_of: Callable[[dict[str, Any], int], str] | None = None
    ) -> Iterator[None]:
        """A bar, and what `line_of` says of every step in the metrics file, also of those of an earlier start."""
        line_of = line_of or step_line
        stop = threading.Event()
        with self._progress() as progress:
            task = progress.add_task("training", total=total_steps)
            steps, shown = FollowedFile(metrics_file, metrics_line), 0

            def show_new() -> None:
                nonlocal shown
                lines = steps.lines()
                for line in lines[shown:]:
                    progress.console.print(line_of(line, total_steps), soft_wrap=True)
                shown = max(shown, len(lines))
                progress.update(task, completed=lines[-1]["step"] + 1 if lines else 0)

            def poll() -> None:
                while not stop.wait(POLL_S):
                    show_new()

            thread = threading.Thread(target=poll, daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
                show_new()

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("      {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )


def quieten_libraries() -> None:
    """Keep the libraries' own bars and warnings off the screen; errors still show."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("bitsandbytes", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|peft|bitsandbytes|sklearn")


def step_line(line: dict[str, Any], total_steps: int) -> str:
    """One step in one line: reward, KL, the judge's toxicity, length, speed, and where the time went."""
    parts = [f"step {line['step'] + 1:>{len(str(total_steps))}}/{total_steps}", f"reward {line['reward']:+.3f}"]
    parts.append(f"KL {line['kl']:6.2f}")
    if "toxicity" in line:
        parts.append(f"toxicity {line['toxicity']:.3f}")
    parts.append(f"length {line['response_length']:4.1f}")
    parts.append(f"{line['tokens_per_s']:5.0f} tokens/s")
    times = [f"{name} {line[f'time_{name}_s']:.1f}" for name in ("rollout", "reward", "learn", "push")]
    if line.get("rejected"):
        parts.append("[yellow]after a roll-back[/yellow]")
    return "      " + "  ".join(parts) + "  [dim]" + " ".join(times) + " s[/dim]"


def tuning_line(line: dict[str, Any], total_steps: int) -> str:
    """One step of a fine-tuning in one line: loss, dev loss where it was looked at, speed."""
    parts = [f"step {line['step'] + 1:>{len(str(total_steps))}}/{total_steps}", f"loss {line['loss']:.3f}"]
    if "dev_loss" in line:
        parts.append(f"[bold]dev loss {line['dev_loss']:.3f}[/bold]")
    parts.append(f"{line['tokens_per_s']:5.0f} tokens/s")
    return "      " + "  ".join(parts)


def with_lab(config: S, terminal: Terminal) -> S:
    """The configuration with the lab's paths; the lab is built under a progress bar when it is needed and absent."""
    if not uses_lab(config) or lab_folder().is_dir():
        return resolve_lab(config)
    with terminal.bar("building the offline lab", total=1) as progress:
        return resolve_lab(config, lambda _, share: progress(share))
