"""A run is a folder: its configuration, metrics, checkpoints, adapter, responses and report."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detox_ray import errors
from detox_ray.config import Config, RewardConfig, dump_config, parse_config
from detox_ray.errors import ConfigError, DetoxError
from detox_ray.learner.train_loop import ADAPTER_FOLDER, FAILURE_FILE, METRICS_FILE

# May differ between a run and its continuation: where it runs, not what it computes.
PLACEMENT = ("ray", "output_dir", "name")


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run folder, and what is read from and written to them."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER_FOLDER

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def dequantized_base(self) -> Path:
        return self.path / "dequantized_base"

    @property
    def ray_logs(self) -> Path:
        return self.path / "ray-logs"

    @classmethod
    def open(cls, config: Config) -> "RunFolder":
        """The folder of a new run, or of the run to continue.

        Raises:
            ConfigError: it holds a run with another configuration, or cannot be written.
        """
        run = cls(config.run_dir)
        if run.config_file.exists():
            old, new = (_flatten(c.model_dump(mode="json")) for c in (run.read_config(), config))
            different = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
            different = [k for k in different if k.split(".")[0] not in PLACEMENT]
            if different:
                key = different[0]
                raise ConfigError(
                    f"{run.path} holds a run with {key} = {old.get(key)!r}, not {new.get(key)!r}; "
                    "choose another name=..., or remove the folder"
                )
        else:
            try:
                run.path.mkdir(parents=True, exist_ok=True)
                run.config_file.write_text(dump_config(config), encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"output_dir: {run.path} cannot be written ({error.strerror})") from None
        (run.path / FAILURE_FILE).unlink(missing_ok=True)
        _log_to(run.path / "run.log")
        return run

    @classmethod
    def existing(cls, path: str | Path) -> "RunFolder":
        """The folder of a run that was started before.

        Raises:
            ConfigError: there is none.
        """
        run = cls(Path(path).resolve())
        if not run.config_file.exists():
            raise ConfigError(f"{path} is no run folder (no config.yaml in it); give a folder such as runs/demo")
        return run

    def read_config(self) -> Config:
        """The configuration the run was started with."""
        return parse_config(yaml.safe_load(self.config_file.read_text(encoding="utf-8")))

    def read_calibrated(self) -> RewardConfig | None:
        """The reward configuration with the calibrations that were fitted when the run started."""
        path = self.path / "calibration.json"
        return RewardConfig.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None

    def write_calibrated(self, reward: RewardConfig) -> None:
        """Keep the fitted calibrations, so that a continued run has the same reward."""
        (self.path / "calibration.json").write_text(reward.model_dump_json(indent=2), encoding="utf-8")

    def read_evaluation(self) -> dict[str, Any] | None:
        """The content of evaluation.json, once the run is complete."""
        path = self.path / "evaluation.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def raise_failure(self) -> None:
        """Raise the error that stopped the learner, if one did."""
        path = self.path / FAILURE_FILE
        if path.exists():
            failure = json.loads(path.read_text(encoding="utf-8"))
            raise getattr(errors, failure["type"], DetoxError)(failure["message"])


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}{key}.").items()}
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return {k: v for i, value in enumerate(tree) for k, v in _flatten(value, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): tree}


def _log_to(path: Path) -> None:
    """Send our own log lines to the run's log file."""
    logger = logging.getLogger("detox_ray")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
