"""One place that metrics are given to, for everybody who wants them; a tracker that fails never stops a run."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from detox_ray.config import RunSettings
from detox_ray.errors import ConfigError
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


class Tracker:
    """What the first learner tells everybody; open it before lines of steps that will run again are cut."""

    def __init__(self, config: RunSettings, run_dir: Path, first_step: int) -> None:
        """`first_step`: the one to be run next; a continued run goes on where its earlier part is tracked."""
        self._said = {"": _last_step(run_dir / METRICS_FILE), JUDGE: _last_step(run_dir / EVALUATIONS_FILE)}
        tracking = config.tracking
        local: list[tuple[str, Callable[[], Sink]]] = [
            ("TensorBoard", lambda: TensorBoardSink(run_dir, first_step)),
            ("Prometheus", lambda: _prometheus(config.name)),
        ]
        remote: list[tuple[str, Callable[[], Sink]]] = []
        if (wandb := tracking.wandb) is not None:
            remote.append(("W&B", lambda: WandbSink(wandb, config, run_dir)))
        if (mlflow := tracking.mlflow) is not None:
            remote.append(("MLflow", lambda: MlflowSink(mlflow, config, run_dir)))
        self._local = [_BackgroundSink(name, make) for name, make in local]
        self._remote = [_BackgroundSink(name, make) for name, make in remote]

    def log(self, line: dict[str, float], prefix: str = "") -> None:
        """A line of metrics.jsonl, or with `prefix=JUDGE` one of evaluations.jsonl; returns at once."""
        step = int(line["step"])
        values = {prefix + name: float(value) for name, value in line.items() if name not in CLOCK}
        # What TensorBoard was told of these steps is purged; other services keep what they have.
        for sink in [*self._local, *(self._remote if step > self._said[prefix] else [])]:
            sink.put(step, values)

    def close(self) -> None:
        """Wait until everybody has everything, or for half a minute."""
        _close([*self._local, *self._remote])


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
            reason = str(error).strip().split("\n")[0] or "no reason given"
            logger.warning("%s gets no more metrics (%s: %s)", self._name, type(error).__name__, reason)


def _prometheus(run_name: str) -> Sink:
    """Apart, as it brings Ray."""
    from detox_ray.tracking.prometheus import PrometheusSink

    return PrometheusSink(run_name)


def _close(sinks: Sequence[_BackgroundSink]) -> None:
    for sink in sinks:
        sink.finish()
    for sink in sinks:
        sink.join(CLOSE_TIMEOUT_S)


def _last_step(path: Path) -> int:
    lines: list[dict[str, Any]] = read_metrics(path)
    return lines[-1]["step"] if lines else -1
