"""A run is a folder: its configuration, metrics, checkpoints, adapter, responses and report."""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter

from detox_ray import errors
from detox_ray.classifier_config import Calibration
from detox_ray.config import PolicyConfig, RunSettings
from detox_ray.config_file import dump_config, parse_section, read_tree
from detox_ray.config_section import S
from detox_ray.errors import ConfigError, DetoxError
from detox_ray.folder_lock import is_in_use, lock, release
from detox_ray.metrics_file import (
    ADAPTER_FOLDER,
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    EVALUATION_FILE,
    FAILURE_FILE,
    FINE_TUNING_FILE,
    METRICS_FILE,
    STEPS_FILE,
    write_atomically,
)
from detox_ray.run_copy import RunCopy

# May differ between a run and its continuation: where and how patiently it runs, not what it computes.
MAY_CHANGE = (
    "ray.", "tracking.", "output_dir", "name", "storage", "rollout.num_cpus", "rollout.num_gpus", "rollout.resources",
    "rollout.canary_tolerance", "rollout.max_logprob_gap", "rollout.timeout_s", "rollout.start_timeout_s",
    "rollout.kv_cache_mib", "rollout.tensor_parallel",
    "reward.timeout_s", "reward.start_timeout_s", "reward.retries",
    "train.num_cpus", "train.num_gpus", "train.resources",
    "train.threads", "train.shard_base", "train.max_failures", "train.timeout_s", "train.checkpoint_every",
)  # fmt: skip
CLASSIFIER_MAY_CHANGE = (
    "replicas", "num_cpus", "num_gpus", "resources", "batch_size",
    "api_key_env", "cache", "requests_per_second", "retries", "timeout_s",
)  # fmt: skip

CALIBRATIONS_FILE = "calibrations.json"
FITTED = TypeAdapter(dict[str, Calibration])
LOG_FILE = "run.log"
UNFINISHED = re.compile(rf"({ADAPTER_FOLDER}|dequantized_base-[^.]+)\.(\d+)\.(tmp|old)")  # by which process
UNFINISHED_S = 3600
JOB_FOLDER = "working_dir_files"  # where Ray unpacks what `ray job submit --working-dir` sent


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run folder, and what is read from and written to them."""

    path: Path
    copy: RunCopy | None = None  # in `storage`, while the run is open

    @property
    def config_file(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER_FOLDER

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINT_FOLDER

    @property
    def has_results(self) -> bool:
        """Whether there is what was computed under its configuration, even if the checkpoints were removed."""
        results = (CHECKPOINT_FOLDER, ADAPTER_FOLDER, EVALUATION_FILE, FINE_TUNING_FILE)
        return any((self.path / name).exists() for name in results)

    def dequantized_base(self, policy: PolicyConfig, dtype: str) -> Path:
        """Of one base in one precision, such as `bfloat16`: a folder of evaluations may hold several."""
        return self.path / f"dequantized_base-{hashlib.sha256((policy.base_identity + dtype).encode()).hexdigest()[:8]}"

    @property
    def ray_logs(self) -> Path:
        return self.path / "ray-logs"

    @classmethod
    @contextmanager
    def open(cls, config: RunSettings) -> Iterator["RunFolder"]:
        """The folder of a new run, or of the run to continue, and its copy in `storage`: this process's for the block.

        Raises:
            ConfigError: the folder, or its copy in `storage`, holds a run with another configuration, is in use by
                another process, or cannot be written.
            TakenOverError: another process has begun to use the copy at the same time.
        """
        copy = RunCopy(config.storage, config.name) if config.storage is not None else None
        with cls.claim(config.run_dir) as run:
            try:
                if copy is not None:
                    if (tree := copy.config_tree()) is not None:
                        _refuse_another(copy.address, _parse_kind(copy.address, tree, type(config)), config)
                    copy.open(run.path)
                run._begin(config)
                yield replace(run, copy=copy)
            finally:
                if copy is not None:
                    copy.release()

    def _begin(self, config: RunSettings) -> None:
        with _refused_unless_writable(self.path):
            if self.config_file.exists() and self.has_results:
                _refuse_another(str(self.path), self.read_config(type(config)), config)
            else:
                # A run that has not come as far as an adapter has nothing to lose, and may become another.
                (self.path / CALIBRATIONS_FILE).unlink(missing_ok=True)
            write_atomically(self.config_file, dump_config(config))
            (self.path / FAILURE_FILE).unlink(missing_ok=True)

    @classmethod
    @contextmanager
    def claim(cls, path: Path) -> Iterator["RunFolder"]:
        """The folder, made if need be, for this process alone during the block; our log lines go to its `run.log`.

        Raises:
            ConfigError: it is in use by another process, cannot be written, or would be deleted by Ray.
        """
        check_usable(path)
        with _refused_unless_writable(path):
            path.mkdir(parents=True, exist_ok=True)
            lock(path)
        try:
            with _refused_unless_writable(path):
                log_to(path)
                _remove_unfinished(path)
            yield cls(path)
        finally:
            release(path)

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

    def read_config(self, kind: type[S]) -> S:
        """The configuration the run was started with.

        Raises:
            ConfigError: it is of another kind of run.
        """
        return _parse_kind(str(self.path), self.read_config_tree(), kind)

    def read_config_tree(self) -> dict[str, Any]:
        """The configuration the run was started with, as it stands in the file.

        Raises:
            ConfigError: it is not YAML.
        """
        return read_tree(self.config_file)

    def read_calibrations(self) -> dict[str, Calibration] | None:
        """Those of the reward's classifiers, by name, that were fitted when the run started."""
        path = self.path / CALIBRATIONS_FILE
        return FITTED.validate_json(path.read_text(encoding="utf-8")) if path.exists() else None

    def write_calibrations(self, fitted: dict[str, Calibration]) -> None:
        """Keep the fitted calibrations, so that a continued run has the same reward."""
        write_atomically(self.path / CALIBRATIONS_FILE, FITTED.dump_json(fitted, indent=2).decode())

    def read_evaluation(self, steps: int) -> dict[str, Any] | None:
        """The content of evaluation.json, if it is of an adapter trained for `steps` steps and the report is there."""
        path = self.path / EVALUATION_FILE
        if not path.exists() or not (self.path / "report.html").exists():
            return None
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        return evaluation if evaluation.get("steps") == steps else None

    def trained_steps(self) -> int:
        """Steps behind the adapter in the folder."""
        return int((self.adapter / STEPS_FILE).read_text(encoding="utf-8"))

    def raise_failure(self) -> None:
        """Raise the error that stopped the learner, if one did."""
        path = self.path / FAILURE_FILE
        if path.exists():
            failure = json.loads(path.read_text(encoding="utf-8"))
            raise getattr(errors, failure["type"], DetoxError)(failure["message"])


@contextmanager
def _refused_unless_writable(folder: Path) -> Iterator[None]:
    """Raises:
    ConfigError: in place of what the system says of the folder.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written ({error.strerror})") from None


def _remove_unfinished(folder: Path) -> None:
    """Remove what killed processes had begun to write; an adapter that was being replaced stays if it is the last one.

    Processes that do not hold the folder, such as an export, write dequantised bases too: those that live here are
    spared, and so is what somebody, maybe elsewhere, has written to for the last hour.
    """
    for path in folder.iterdir():
        name = UNFINISHED.fullmatch(path.name)
        if name is None or psutil.pid_exists(int(name[2])) or time.time() - _changed_at(path) < UNFINISHED_S:
            continue
        if name[3] == "tmp" or (folder / name[1]).exists():
            shutil.rmtree(path)


def _changed_at(folder: Path) -> float:
    """When something in it was written last, in seconds since 1970."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _parse_kind(where: str, tree: dict[str, Any], kind: type[S]) -> S:
    """The configuration of the run that is there.

    Raises:
        ConfigError: it is of another kind of run.
    """
    if ("reward" in tree) != ("reward" in kind.model_fields):
        found, wanted = "detoxification run (detox-ray train)", "fine-tuning run (detox-ray sft)"
        if "reward" not in tree:
            found, wanted = wanted, found
        raise ConfigError(
            f"{where} holds a {found}, and this needs a {wanted}; choose another name=..., which can go on "
            f"from policy.adapter={where}/{ADAPTER_FOLDER}"
        )
    return parse_section(kind, tree)


def _refuse_another(where: str, found: RunSettings, wanted: RunSettings) -> None:
    """Raises:
    ConfigError: the run found there is another one; what may differ is where it runs and where its files are.
    """
    old, new = (_flatten(config.model_dump(mode="json")) for config in (found, wanted))
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if before != now and not _may_change(key) and not _has_moved(before, now):
            raise ConfigError(
                f"{where} holds a run with {key} = {before!r}, not {now!r}; "
                "choose another name=..., or remove the folder"
            )


def _has_moved(before: Any, now: Any) -> bool:
    """Whether a file or folder is in another place now, as with every job that brings its working directory."""
    if not (isinstance(before, str) and isinstance(now, str) and os.path.isabs(before) and os.path.isabs(now)):
        return False
    return Path(before).name == Path(now).name and not Path(before).exists() and Path(now).exists()


def _may_change(key: str) -> bool:
    if key.startswith("reward.classifiers.") or key.startswith("evaluation.judge."):
        return not {*CLASSIFIER_MAY_CHANGE}.isdisjoint(key.split("."))
    return key.startswith(MAY_CHANGE)


def check_usable(path: Path) -> None:
    """Refuse at once, and without a trace, a folder that `RunFolder.claim` could not have.

    Raises:
        ConfigError: it is in use by another process, cannot be written, or would be deleted by Ray.
    """
    if JOB_FOLDER in path.parts:
        raise ConfigError(
            f"output_dir: {path} is in the job's copy of its working directory, which Ray deletes; take one on "
            "storage that every node mounts at the same path, such as output_dir=/shared/runs"
        )
    with _refused_unless_writable(path):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ConfigError(f"output_dir: {there} is no folder that can be written; choose another")
        if is_in_use(path):
            raise ConfigError(f"{path} is in use by another process; wait, or choose another name=...")


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}{key}.").items()}
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return {k: v for i, value in enumerate(tree) for k, v in _flatten(value, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): tree}


def log_to(folder: Path) -> None:
    """Send this process's own log lines to the run's log file, of which each process appends whole lines."""
    logger = logging.getLogger("detox_ray")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
