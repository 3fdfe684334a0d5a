"""What every Ray Train worker runs: the loop, its checkpoints and its metrics file."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray.train
import torch
from ray.train.torch import get_device

from detox_ray.config import Config
from detox_ray.errors import DetoxError
from detox_ray.learner.distributed import on_first_learner, world
from detox_ray.learner.ppo import PPO, SamplingLaw
from detox_ray.policy.adapter import Adapter, load_adapter, save_adapter
from detox_ray.policy.policy import Canary, Policy
from detox_ray.records import Rollout

METRICS_FILE = "metrics.jsonl"
FAILURE_FILE = "failure.json"
ADAPTER_FOLDER = "adapter"


class ScoredBatch(Protocol):
    """A step's rollouts (the samples of a prompt together), `rewards: [B] float32`, and how old the policy was."""

    @property
    def rollouts(self) -> list[Rollout]: ...

    @property
    def rewards(self) -> np.ndarray: ...

    @property
    def staleness(self) -> int: ...

    @property
    def metrics(self) -> dict[str, float]: ...


class Stream(Protocol):
    """Where batches come from and adapters go to; see `RolloutStream`."""

    def connect(self) -> None: ...

    def next_batch(self, step: int, last_step: int) -> ScoredBatch: ...

    def publish(self, make_adapter: Callable[[int], Adapter], canary: Canary) -> int: ...


@dataclass(frozen=True)
class LearnerTask:
    """All a learner needs, small enough to send."""

    config: Config
    run_dir: str
    stream: Stream
    end_ids: tuple[int, ...]
    pad_id: int
    canary_length: int


def train_loop(settings: dict[str, LearnerTask]) -> None:
    """Run the learner; an error that a new attempt would meet again is written down instead of raised."""
    task = settings["task"]
    try:
        _train(task)
    except DetoxError as error:
        # Raising would make Ray Train try again what cannot succeed.
        if world()[0] == 0:
            write_failure(Path(task.run_dir), error)


def _train(task: LearnerTask) -> None:
    config, run_dir, stream = task.config, Path(task.run_dir), task.stream
    torch.set_num_threads(config.train.threads)
    policy = Policy(config.policy, get_device(), config.seed)
    ppo = PPO(policy, config.ppo, _sampling_law(task), task.pad_id, config.train.total_steps, config.seed)
    first_step = _resume(ppo)
    last_step = config.train.total_steps - 1
    on_first_learner(stream.connect)
    version = on_first_learner(lambda: stream.publish(policy.adapter, policy.canary(task.canary_length)))
    if world()[0] == 0:
        cut_metrics(run_dir / METRICS_FILE, first_step)

    for step in range(first_step, config.train.total_steps):
        started = time.perf_counter()
        batch = on_first_learner(partial(stream.next_batch, step, last_step))
        rollouts, rewards = _share(batch)
        received = time.perf_counter()
        metrics = ppo.update(rollouts, rewards, step, on_policy=batch.staleness == 0)
        learned = time.perf_counter()
        version = on_first_learner(lambda: stream.publish(policy.adapter, policy.canary(task.canary_length)))
        finished = time.perf_counter()

        tokens = sum(len(r.response_ids) for r in batch.rollouts)
        line = {"step": step, **batch.metrics, **metrics, "staleness": batch.staleness, "adapter_version": version}
        line |= {
            "time_learn_s": learned - received,
            "time_push_s": finished - learned,
            "time_step_s": finished - started,
        }
        line |= {
            "tokens_per_s": tokens / (finished - started),
            "samples_per_s": len(batch.rollouts) / (finished - started),
        }
        if world()[0] == 0:
            append_metrics(run_dir / METRICS_FILE, line)
        if step == last_step or (step + 1) % config.train.checkpoint_every == 0:
            _checkpoint(ppo, step, line, run_dir)


def _share(batch: ScoredBatch) -> tuple[Sequence[Rollout], np.ndarray]:
    """This learner's contiguous part of a batch."""
    rank, learners = world()
    size = len(batch.rollouts) // learners
    mine = slice(rank * size, (rank + 1) * size)
    return batch.rollouts[mine], batch.rewards[mine]


def _sampling_law(task: LearnerTask) -> SamplingLaw:
    rollout = task.config.rollout
    return SamplingLaw(
        temperature=rollout.temperature,
        suppressed=task.end_ids if rollout.fixed_length else (),
        samples_per_prompt=rollout.samples_per_prompt,
        max_logprob_gap=rollout.max_logprob_gap,
    )


def _checkpoint(ppo: PPO, step: int, metrics: dict[str, Any], run_dir: Path) -> None:
    """Save adapter, value head, optimiser and step through Ray Train; prompts and randomness follow from the step."""
    if world()[0] != 0:
        ray.train.report(metrics)
        return
    adapter = ppo.policy.adapter(version=step)
    save_adapter(adapter, run_dir / ADAPTER_FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, Path(folder) / ADAPTER_FOLDER)
        torch.save({"step": step, **ppo.state()}, Path(folder) / "learner.pt")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _resume(ppo: PPO) -> int:
    """Load the last checkpoint, if there is one; the first step to run."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        ppo.policy.load(load_adapter(Path(folder) / ADAPTER_FOLDER))
        state = torch.load(Path(folder) / "learner.pt", weights_only=True)
    ppo.load_state(state)
    return int(state["step"]) + 1


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    """Append one step's line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def cut_metrics(path: Path, first_step: int) -> None:
    """Drop the lines of steps that will be run again, so that no step stands in the file twice."""
    kept = [line for line in read_metrics(path) if line["step"] < first_step]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def write_failure(run_dir: Path, error: DetoxError) -> None:
    """Leave the error for the driver."""
    content = {"type": type(error).__name__, "message": str(error)}
    (run_dir / FAILURE_FILE).write_text(json.dumps(content), encoding="utf-8")
