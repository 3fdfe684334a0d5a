"""One place that metrics are given to, for everybody who wants them; a tracker that fails never stops a run."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from detox_ray.config import RunSettings
from detox_ray.errors import ConfigError, first_line
from detox_ray.metrics_file import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from detox_ray.tracking.remote import MlflowSink, WandbSink
from detox_ray.tracking.tensorboard import TensorBoardSink
from detox_ray.tracking_config import TrackingConfig

logger = logging.getLogger(__name__)

CLOCK = ("step", "ended_at")  # trackers have clocks of their own
JUDGE = "judge/"  # before the names of what the judge says while it trains
CLOSE_TIMEOUT_S = 30.0


class Sink(Protocol):
    """Somebody who wants the metrics."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


Sinks = Mapping[str, Callable[[], Sink]]  # name -> what opens it


class Tracker:
    """What the first learner tells everybody."""

    def __init__(self, run_dir: Path, local: Sinks, remote: Sinks) -> None:
        """`remote` sinks keep what they were told before, so they are not told again of steps that are run again."""
        self._said = {"": _last_step(run_dir / METRICS_FILE), JUDGE: _last_step(run_dir / EVALUATIONS_FILE)}
        self._local = [_BackgroundSink(name, make) for name, make in local.items()]
        self._remote = [_BackgroundSink(name, make) for name, make in remote.items()]

    def log(self, line: dict[str, float], prefix: str = "") -> None:
        """A line of metrics.jsonl, or with `prefix=JUDGE` one of evaluations.jsonl; returns at once."""
        step = int(line["step"])
        values = {prefix + name: float(value) for name, value in line.items() if name not in CLOCK}
        for sink in [*self._local, *(self._remote if step > self._said[prefix] else [])]:
            sink.put(step, values)

    def close(self) -> None:
        """Wait until everybody has everything, or for half a minute each."""
        sinks = [*self._local, *self._remote]
        for sink in sinks:
            sink.finish()
        for sink in sinks:
            sink.join(CLOSE_TIMEOUT_S)


def open_tracker(config: RunSettings, run_dir: Path, first_step: int) -> Tracker:
    """The tracker of a run whose next step is `first_step`; call it before the lines of later steps are cut."""
    from detox_ray.tracking.prometheus import PrometheusSink

    remote: dict[str, Callable[[], Sink]] = {}
    if (wandb := config.tracking.wandb) is not None:
        remote["W&B"] = lambda: WandbSink(wandb, config, run_dir)
    if (mlflow := config.tracking.mlflow) is not None:
        remote["MLflow"] = lambda: MlflowSink(mlflow, config, run_dir)
    local: dict[str, Callable[[], Sink]] = {
        "TensorBoard": lambda: TensorBoardSink(run_dir, first_step),
        "Prometheus": lambda: PrometheusSink(config.name),
    }
    return Tracker(run_dir, local, remote)


def check_tracking(config: TrackingConfig) -> None:
    """Refuse what cannot be had.

    Raises:
        ConfigError: a package is not installed.
    """
    for section, package in (("wandb", "wandb"), ("mlflow", "mlflow")):
        if getattr(config, section) is not None and find_spec(package) is None:
            raise ConfigError(
                f"tracking.{section} needs the package {package}: pip install 'detox_ray[tracking]', or remove it"
            )


class _BackgroundSink:
    """Feeds one sink from a thread, so that a slow service does not slow the learner."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._lines: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"tracking-{name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        self._lines.put((step, values))

    def finish(self) -> None:
        self._lines.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _work(self, make: Callable[[], Sink]) -> None:
        try:
            sink = make()
            while (line := self._lines.get()) is not None:
                sink.write(*line)
            sink.close()
        except Exception as error:
            # Whatever a service or its client raises, the run and its own files come first.
            reason = first_line(error) or "no reason given"
            logger.warning("%s gets no more metrics (%s: %s)", self._name, type(error).__name__, reason)


def _last_step(path: Path) -> int:
    lines = read_metrics(path)
    return lines[-1]["step"] if lines else -1
