"""Checkpoints of a learner through Ray Train, and the error a learner leaves for the driver."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import ray.train
from ray.train import CheckpointUploadMode

from detox_ray.errors import DetoxError, storage_error
from detox_ray.learner.checkpoint_folder import last_whole_checkpoint, read_checkpoint, write_checkpoint
from detox_ray.learner.distributed import is_first_learner, learner_count, on_first_learner
from detox_ray.metrics_file import FAILURE_FILE, write_atomically
from detox_ray.policy.policy import Policy


class Learner(Protocol):
    """A policy and whatever else must be as it was for training to go on."""

    policy: Policy

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def save_checkpoint(learner: Learner, step: int, metrics: dict[str, Any], checkpoints: Path) -> None:
    """Save adapter, state and step for Ray Train, on all learners; data and randomness follow from the step.

    The checkpoint is written where it stays: `checkpoints` is the folder that Ray Train keeps them in.
    """
    if not is_first_learner():
        ray.train.report(metrics)
        return
    folder = checkpoints / f"checkpoint_{step}_{uuid4().hex[:8]}"
    folder.mkdir()
    write_checkpoint(folder, step, learner.policy.adapter(), learner.state())
    checkpoint = ray.train.Checkpoint.from_directory(folder)
    ray.train.report(metrics, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def resume(learner: Learner, checkpoints: Path) -> int:
    """Load the last whole checkpoint of the folder, if there is one; the first step to run.

    Ray's own list is not asked: a checkpoint on it may be damaged, and one that is whole may be missing.

    Raises:
        StorageError: there are checkpoints, and all are damaged.
    """
    if (found := on_first_learner(partial(last_whole_checkpoint, checkpoints))) is None:
        return 0
    step, folder = found
    adapter, state = read_checkpoint(folder)
    learner.policy.load(adapter)
    learner.load_state(state)
    return step + 1


def leave_failure(run_dir: Path, work: Callable[[], None]) -> None:
    """Do the work of a learner; an error of ours, or of full storage, is left in the run folder for the driver.

    With one learner the error is not raised again, since Ray Train would retry what cannot succeed. With several it is,
    because the others may be waiting for this one; the attempt Ray then starts finds the file and returns.
    """
    if on_first_learner((run_dir / FAILURE_FILE).exists):
        return
    try:
        work()
    except (DetoxError, OSError) as error:
        ours = error if isinstance(error, DetoxError) else storage_error(error, str(run_dir))
        if ours is None:
            raise
        try:
            write_atomically(run_dir / FAILURE_FILE, json.dumps({"type": type(ours).__name__, "message": str(ours)}))
        except OSError:
            raise ours from None
        if learner_count() > 1:
            raise ours from None
