"""The last step's metrics on Ray's Prometheus endpoint, a gauge each, labelled with the run."""

from ray.util.metrics import Gauge

from detox_ray.metric_names import FAMILIES, TRAINING, TUNING, Metric, gauge_name

RUN = "run"


class PrometheusSink:
    """Sets gauges in this process; Ray's agent on the node exports them."""

    def __init__(self, run_name: str) -> None:
        self._run = run_name
        self._gauges: dict[str, Gauge] = {}

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in {"step": step, **values}.items():
            prefix, slash, rest = name.partition("/")
            if slash:
                family = FAMILIES[prefix]
                self._gauge(family.gauge, family.metric, (RUN, family.label)).set(
                    value, {RUN: self._run, family.label: rest}
                )
            else:
                self._gauge(name, TRAINING.get(name) or TUNING[name], (RUN,)).set(value, {RUN: self._run})

    def close(self) -> None:
        """The gauges go with the process."""

    def _gauge(self, name: str, metric: Metric, labels: tuple[str, ...]) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(gauge_name(name), f"{metric.meaning} ({metric.unit})", labels)
        return self._gauges[name]
