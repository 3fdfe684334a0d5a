"""What every Ray Train worker runs: the loop, its checkpoints and its metrics file."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from ray.train.torch import get_device

from detox_ray.config import Config
from detox_ray.errors import DivergenceError
from detox_ray.learner.checkpoint_folder import is_kept, keep_adapter
from detox_ray.learner.checkpoints import leave_failure, resume, save_checkpoint
from detox_ray.learner.distributed import is_first_learner, on_first_learner, world
from detox_ray.learner.ppo import PPO, SamplingDistribution
from detox_ray.learner.recovery import Recovery, refuse_collapsed, refuse_not_finite
from detox_ray.metrics_file import (
    CHECKPOINT_FOLDER,
    EVALUATIONS_FILE,
    METRICS_FILE,
    REJECTED_FILE,
    append_metrics,
    cut_metrics,
    read_metrics,
)
from detox_ray.policy.adapter import Adapter
from detox_ray.policy.policy import Policy
from detox_ray.records import Batch, Canary, Rollout
from detox_ray.run_folder import log_to
from detox_ray.tracking.tracker import JUDGE, Tracker, open_tracker


class Stream(Protocol):
    """Where batches come from and adapters go to; see `RolloutStream`."""

    def connect(self) -> None: ...

    def start(self, step: int, last_step: int) -> None: ...

    def next_batch(self, step: int, last_step: int) -> Batch: ...

    def publish(self, make_adapter: Callable[[int], Adapter], canary: Canary) -> int: ...

    def verify(self) -> None: ...

    def discard(self) -> int: ...

    def evaluate(self, step: int, reward: float) -> None: ...

    def evaluations(self, until: int = 0) -> list[dict[str, float]]: ...


@dataclass(frozen=True)
class LearnerTask:
    """All a learner needs, in a form that can be sent."""

    config: Config
    run_dir: str
    stream: Stream
    end_ids: tuple[int, ...]
    pad_id: int
    canary_length: int


def train_loop(task: LearnerTask) -> None:
    """Run the learner; an error of ours is left in the run folder, for the driver to raise."""
    log_to(Path(task.run_dir))
    leave_failure(Path(task.run_dir), partial(_train, task))


def _train(task: LearnerTask) -> None:
    config, run_dir, stream = task.config, Path(task.run_dir), task.stream
    torch.set_num_threads(config.train.threads)
    policy = Policy(config.policy, get_device(), config.seed, config.train.shard_base, config.train.compile)
    ppo = PPO(policy, config.ppo, _sampling_distribution(task), task.pad_id, config.train.total_steps, config.seed)
    recovery = Recovery(ppo, run_dir)
    first_step = resume(recovery, run_dir / CHECKPOINT_FOLDER)
    last_step = config.train.total_steps - 1
    on_first_learner(stream.connect)
    publish(task, policy)
    is_first = is_first_learner()
    tracker = open_tracker(config, run_dir, first_step) if is_first else None
    if is_first:
        cut_metrics(run_dir / METRICS_FILE, first_step)
        cut_metrics(run_dir / EVALUATIONS_FILE, first_step)
        cut_metrics(run_dir / REJECTED_FILE, first_step)
        evaluate_again(task, first_step)

    for step in range(first_step, config.train.total_steps):
        line = healthy_step(task, ppo, recovery, step)
        is_kept_step = step == last_step or (step + 1) % config.train.checkpoint_every == 0
        if tracker is not None:
            if _is_evaluated(config, step):
                stream.evaluate(step, line["reward"])
            stream.start(step + 1, last_step)  # sampled while this step is written down
            append_evaluations(task, tracker, until=step if is_kept_step else 0)
            append_metrics(run_dir / METRICS_FILE, line)
            tracker.log(line)
        if is_kept_step:
            if is_first:
                keep_adapter(policy.adapter(), run_dir, step + 1)
            save_checkpoint(recovery, step, line, run_dir / CHECKPOINT_FOLDER)
    on_first_learner(stream.verify)
    if is_first and not is_kept(policy.adapter(), run_dir):
        keep_adapter(policy.adapter(), run_dir, last_step + 1)
    if tracker is not None:
        append_evaluations(task, tracker, until=config.train.total_steps)
        tracker.close()


def append_evaluations(task: LearnerTask, tracker: Tracker, until: int) -> None:
    """Write down the evaluations that are finished, and those of steps before `until`, which are waited for."""
    for evaluation in task.stream.evaluations(until):
        append_metrics(Path(task.run_dir) / EVALUATIONS_FILE, evaluation)
        tracker.log(evaluation, JUDGE)


def evaluate_again(task: LearnerTask, first_step: int) -> None:
    """Begin the evaluation of the step before the first one, if it was under way when the run was killed."""
    steps, evaluated = (read_metrics(Path(task.run_dir) / file) for file in (METRICS_FILE, EVALUATIONS_FILE))
    step = first_step - 1
    if steps and _is_evaluated(task.config, step) and step not in [line["step"] for line in evaluated]:
        task.stream.evaluate(step, steps[-1]["reward"])


def _is_evaluated(config: Config, step: int) -> bool:
    return config.evaluation.every > 0 and (step + 1) % config.evaluation.every == 0


def healthy_step(task: LearnerTask, ppo: PPO, recovery: Recovery, step: int) -> dict[str, float]:
    """One step, again from the last good adapter if it had to be rejected; its line for the metrics file.

    Raises:
        DivergenceError: it had to be rejected again.
    """
    rejected, dropped, started = 0, 0, time.perf_counter()
    recovery.begin_step(step)
    while True:
        try:
            line = one_step(task, ppo, step, started)
        except DivergenceError as problem:
            recovery.roll_back(step, problem)
            rejected += 1
        else:
            recovery.step_is_good()
            return {"step": step, **line, "rejected": rejected, "dropped_batches": dropped, "ended_at": time.time()}
        # Behind the handler, whose exception holds on to what the update had in memory.
        make_room(task.config)
        dropped += 1 + on_first_learner(task.stream.discard)
        publish(task, ppo.policy)


def one_step(task: LearnerTask, ppo: PPO, step: int, started: float) -> dict[str, float]:
    """Receive a batch, update, publish; returns the step's metrics. `started`: `time.perf_counter()` at its start.

    Raises:
        DivergenceError: the batch, the update or the adapter is not good; nothing was published.
    """
    config, stream = task.config, task.stream
    batch = on_first_learner(partial(stream.next_batch, step, config.train.total_steps - 1))
    refuse_collapsed(batch.rollouts, config.ppo.divergence)
    rollouts, rewards = _share(batch)
    received = time.perf_counter()
    metrics = ppo.update(rollouts, rewards, step, on_policy=batch.staleness == 0)
    learned = time.perf_counter()
    make_room(config)
    version = publish(task, ppo.policy)
    finished = time.perf_counter()
    seconds = finished - started
    return {
        **batch.metrics,
        **metrics,
        "staleness": batch.staleness,
        "adapter_version": version,
        "time_learn_s": learned - received,
        "time_push_s": batch.metrics["time_acknowledge_s"] + finished - learned,
        "time_step_s": seconds,
        "tokens_per_s": sum(len(r.response_ids) for r in batch.rollouts) / seconds,
        "samples_per_s": len(batch.rollouts) / seconds,
    }


def make_room(config: Config) -> None:
    """Give back what the update took, for the engines that wake up now."""
    if config.rollout.in_turns:
        torch.cuda.empty_cache()


def publish(task: LearnerTask, policy: Policy) -> int:
    """Send the adapter to the rollout workers; its version.

    Raises:
        DivergenceError: a log-probability that the policy gives is not finite.
    """
    canary = policy.canary(task.canary_length)  # on every learner: those of a sharded base compute together
    refuse_not_finite(canary)
    return on_first_learner(lambda: task.stream.publish(policy.adapter, canary))


def _share(batch: Batch) -> tuple[Sequence[Rollout], np.ndarray]:
    """This learner's contiguous part of a batch."""
    rank, learners = world()
    size = len(batch.rollouts) // learners
    mine = slice(rank * size, (rank + 1) * size)
    return batch.rollouts[mine], batch.rewards[mine]


def _sampling_distribution(task: LearnerTask) -> SamplingDistribution:
    rollout = task.config.rollout
    return SamplingDistribution(
        temperature=rollout.temperature,
        suppressed=task.end_ids if rollout.fixed_length else (),
        samples_per_prompt=rollout.samples_per_prompt,
        max_logprob_gap=rollout.max_logprob_gap,
    )
