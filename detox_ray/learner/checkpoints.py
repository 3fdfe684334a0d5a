"""Checkpoints of a learner through Ray Train, and the error a learner leaves for the driver."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray.train
import torch

from detox_ray.errors import DetoxError
from detox_ray.learner.distributed import world
from detox_ray.metrics_file import ADAPTER_FOLDER, FAILURE_FILE, write_atomically
from detox_ray.policy.adapter import load_adapter, save_adapter
from detox_ray.policy.policy import Policy

LEARNER_FILE = "learner.pt"


class Learner(Protocol):
    """A policy and whatever else must be as it was for training to go on."""

    policy: Policy

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def save_checkpoint(learner: Learner, step: int, metrics: dict[str, Any]) -> None:
    """Save adapter, state and step through Ray Train, on all learners; data and randomness follow from the step."""
    if world()[0] != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(learner.policy.adapter(version=step), Path(folder) / ADAPTER_FOLDER)
        torch.save({"step": step, **learner.state()}, Path(folder) / LEARNER_FILE)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def resume(learner: Learner) -> int:
    """Load the last checkpoint, if there is one; the first step to run."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        learner.policy.load(load_adapter(Path(folder) / ADAPTER_FOLDER))
        state = torch.load(Path(folder) / LEARNER_FILE, weights_only=True)
    learner.load_state(state)
    return int(state["step"]) + 1


@contextmanager
def failures_left_in(run_dir: Path) -> Iterator[None]:
    """Leave an error of ours in the run folder, for the driver to raise.

    Ray Train would try again what cannot succeed, but several learners must all stop: one may wait for another.
    """
    try:
        yield
    except DetoxError as error:
        content = {"type": type(error).__name__, "message": str(error)}
        write_atomically(run_dir / FAILURE_FILE, json.dumps(content))
        if world()[1] > 1:
            raise
