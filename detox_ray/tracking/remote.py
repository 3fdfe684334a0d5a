"""Weights & Biases and MLflow: each run folder has one run there, which its continuations go on with."""

import json
import time
from pathlib import Path
from typing import Any

from detox_ray.config import RunSettings
from detox_ray.metrics_file import write_atomically
from detox_ray.tracking_config import MlflowConfig, WandbConfig

IDS_FILE = "tracking.json"  # in the run folder: what the services call the run
PARAMS_A_CALL = 100  # MLflow takes no more


class WandbSink:
    """A run of Weights & Biases, drawn over `step`; continued under its id."""

    def __init__(self, wandb_config: WandbConfig, config: RunSettings, run_dir: Path) -> None:
        import wandb

        known = _read_ids(run_dir).get("wandb")
        self._run = wandb.init(
            project=wandb_config.project,
            entity=wandb_config.entity,
            mode=wandb_config.mode,
            dir=str(run_dir),
            name=config.name,
            id=known,
            resume="allow" if known and wandb_config.mode == "online" else None,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        _write_id(run_dir, "wandb", self._run.id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """A run of an MLflow experiment; continued under its id."""

    def __init__(self, mlflow_config: MlflowConfig, config: RunSettings, run_dir: Path) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=mlflow_config.uri)
        known = _read_ids(run_dir).get("mlflow")
        if known is not None:
            self._run_id = known
            self._client.update_run(known, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(mlflow_config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(mlflow_config.experiment)
        self._run_id = self._client.create_run(experiment, run_name=config.name).info.run_id
        _write_id(run_dir, "mlflow", self._run_id)
        given = [Param(key, str(value)) for key, value in _flat(config.model_dump(mode="json")).items()]
        for start in range(0, len(given), PARAMS_A_CALL):
            self._client.log_batch(self._run_id, params=given[start : start + PARAMS_A_CALL])

    def write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # A store of files cannot have both `reward` and `reward/...`.
        metrics = [Metric(name.replace("/", "."), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _read_ids(run_dir: Path) -> dict[str, str]:
    path = run_dir / IDS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_id(run_dir: Path, service: str, run_id: str) -> None:
    write_atomically(run_dir / IDS_FILE, json.dumps(_read_ids(run_dir) | {service: run_id}))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a.b.0": value}` of nested dicts and lists."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    if isinstance(tree, list):
        return {k: v for i, value in enumerate(tree) for k, v in _flat(value, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): tree}
