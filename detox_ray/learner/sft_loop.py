"""What every Ray Train worker of a fine-tuning runs: steps, looks at the dev loss, the best adapter, early stopping."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from ray.train.torch import get_device

from detox_ray.learner.checkpoint_folder import is_kept, keep_adapter
from detox_ray.learner.checkpoints import leave_failure, resume, save_checkpoint
from detox_ray.learner.distributed import is_first_learner
from detox_ray.learner.sft import SFT, BucketedBatches, share_of
from detox_ray.metrics_file import (
    CHECKPOINT_FOLDER,
    FINE_TUNING_FILE,
    METRICS_FILE,
    append_metrics,
    cut_metrics,
    write_atomically,
)
from detox_ray.policy.policy import Policy
from detox_ray.records import TokenizedExample
from detox_ray.run_folder import log_to
from detox_ray.sft_config import SFTConfig
from detox_ray.tracking.tracker import open_tracker


@dataclass(frozen=True)
class TuningTask:
    """All a learner needs, in a form that can be sent."""

    config: SFTConfig
    run_dir: str
    train: Sequence[TokenizedExample]
    dev: Sequence[TokenizedExample]
    pad_id: int
    total_steps: int


def sft_loop(task: TuningTask) -> None:
    """Run the learner; an error of ours is left in the run folder, for the driver to raise."""
    log_to(Path(task.run_dir))
    leave_failure(Path(task.run_dir), partial(_tune, task))


def _tune(task: TuningTask) -> None:
    config, run_dir, train = task.config, Path(task.run_dir), task.config.train
    torch.set_num_threads(train.threads)
    policy = Policy(config.policy, get_device(), config.seed, train.shard_base, train.compile)
    sft = SFT(policy, train, train.microbatch_tokens, task.pad_id, task.total_steps, config.seed)
    batches = BucketedBatches(task.train, train.batch_size, config.seed)
    dev = share_of(task.dev)
    step = resume(sft, run_dir / CHECKPOINT_FOLDER)
    if step == 0:
        sft.evaluate(dev, steps=0)
    _keep_best(sft, run_dir)
    tracker = open_tracker(config, run_dir, step) if is_first_learner() else None
    if tracker is not None:
        cut_metrics(run_dir / METRICS_FILE, step)

    while step < task.total_steps and not _is_patience_over(sft, train.patience):
        started = time.perf_counter()
        metrics = sft.update(share_of(batches(step)), step)
        learned = time.perf_counter()
        line = {"step": step, **metrics, "time_learn_s": learned - started}
        line["tokens_per_s"] = metrics["tokens"] / line["time_learn_s"]
        step += 1
        is_look = step == task.total_steps or step % train.evaluate_every == 0
        if is_look:
            sft.evaluate(dev, step)
            _keep_best(sft, run_dir)
            line |= {"dev_loss": sft.dev_loss.last, "time_dev_s": time.perf_counter() - learned}
        line["ended_at"] = time.time()
        if tracker is not None:
            append_metrics(run_dir / METRICS_FILE, line)
            tracker.log(line)
        if is_look:
            save_checkpoint(sft, step - 1, line, run_dir / CHECKPOINT_FOLDER)
    if tracker is not None:
        tracker.close()
        found = sft.dev_loss
        result = {
            "steps": step,
            "best_steps": found.best_steps,
            "dev_loss_before": found.first,
            "dev_loss": found.best,
            "stopped_early": step < task.total_steps,
            "train_examples": len(task.train),
            "dev_examples": len(task.dev),
        }
        write_atomically(run_dir / FINE_TUNING_FILE, json.dumps(result, indent=2))


def _is_patience_over(sft: SFT, patience: int | None) -> bool:
    return patience is not None and sft.dev_loss.looks_since_best >= patience


def _keep_best(sft: SFT, run_dir: Path) -> None:
    """Make the best adapter so far the run's, if it is not, or not whole."""
    if is_first_learner() and not is_kept(sft.best, run_dir):
        keep_adapter(sft.best, run_dir, sft.dev_loss.best_steps)
