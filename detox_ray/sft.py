"""Supervised fine-tuning, in the order it happens: examples go in, the adapter of the lowest dev loss comes out."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from detox_ray.cluster import announce_shortage, local_capacity, ray_session, starts_own_ray
from detox_ray.data.example_split import ExampleSplit, dev_prompts, load_examples
from detox_ray.data.learned import learned_by, write_learned
from detox_ray.errors import ConfigError, ModelError
from detox_ray.learner.sft import steps_per_epoch
from detox_ray.learner.sft_loop import TuningTask, sft_loop
from detox_ray.metrics_file import DEV_PROMPTS_FILE, FINE_TUNING_FILE, write_atomically
from detox_ray.placement import check_placements, learner_placement
from detox_ray.policy.adapter import is_whole
from detox_ray.policy.compilation import check_compiler
from detox_ray.policy.load import end_token_ids, load_model_config, load_tokenizer
from detox_ray.policy.policy import check_adapter
from detox_ray.reservation import Reservation, reserve
from detox_ray.run_copy import mirrored_to_storage
from detox_ray.run_folder import RunFolder, check_usable
from detox_ray.sft_config import SFTConfig
from detox_ray.terminal import Terminal, tuning_line, with_lab
from detox_ray.tracking.tracker import check_tracking
from detox_ray.trainer import run_learners


@dataclass(frozen=True)
class TuningPlan:
    """A fine-tuning whose parts are known to fit together, before anything expensive has started."""

    config: SFTConfig
    run: RunFolder
    examples: ExampleSplit
    pad_id: int

    @property
    def total_steps(self) -> int:
        """Optimiser steps, as configured or of so many epochs."""
        train = self.config.train
        return train.total_steps or math.ceil(
            train.epochs * steps_per_epoch(len(self.examples.train), train.batch_size)
        )


def fine_tune(config: SFTConfig, quiet: bool = False) -> dict[str, Any]:
    """Train an adapter on prompts and responses; a run that was killed continues from its folder.

    Args:
        config: of the run; its folder is `config.run_dir`.
        quiet: print nothing.

    Returns:
        The content of `fine_tuning.json`: dev loss before and of the adapter that was kept (nats per response token),
        the steps behind it, all steps, and whether it stopped early.

    Raises:
        ConfigError, DataError, ModelError: something does not fit; nothing expensive has started.
        DetoxError: the run was stopped; the folder can be continued once the cause is mended.
    """
    terminal = Terminal(quiet)
    with prepare(config, terminal) as plan, mirrored_to_storage(plan.run.copy, plan.run.path):
        return run(plan, terminal)


def run(plan: TuningPlan, terminal: Terminal) -> dict[str, Any]:
    """Run a checked plan; if it is already complete, return its stored evaluation."""
    result_file = plan.run.path / FINE_TUNING_FILE
    if result_file.exists() and is_whole(plan.run.adapter):
        terminal.stage(f"{plan.run.path} is complete; remove it to run again")
        return json.loads(result_file.read_text(encoding="utf-8"))
    needed = [learner_placement(plan.config.train)]
    with ray_session(plan.config.ray, partial(check_placements, needed), plan.run.ray_logs):
        announce_shortage(needed, terminal)
        terminal.stage(f"training for at most {plan.total_steps} steps")
        with (
            reserve(needed, terminal.stage) as reservation,
            terminal.follow_steps(plan.run.metrics_file, plan.total_steps, tuning_line),
        ):
            fit(plan, reservation)
    result = json.loads(result_file.read_text(encoding="utf-8"))
    terminal.stage(
        f"dev loss {result['dev_loss_before']:.3f} before, {result['dev_loss']:.3f} after {result['best_steps']} steps"
        + (" (stopped early)" if result["stopped_early"] else "")
    )
    terminal.stage(f"adapter: {plan.run.adapter}")
    return result


@contextmanager
def prepare(config: SFTConfig, terminal: Terminal) -> Iterator[TuningPlan]:
    """Check what can be refused before it costs, read the examples, open the run folder for the block.

    Raises:
        ConfigError, DataError, ModelError: something does not fit.
    """
    check_usable(config.run_dir)
    if starts_own_ray(config.ray):
        check_placements([learner_placement(config.train)], local_capacity(config.ray))
        if config.train.compile:
            check_compiler()
    check_tracking(config.tracking)
    given = config.with_absolute_paths()
    config = with_lab(given, terminal)
    positions = getattr(load_model_config(config.policy), "max_position_embeddings", config.data.max_tokens)
    if config.data.max_tokens > positions:
        raise ConfigError(
            f"data.max_tokens={config.data.max_tokens} exceeds the {positions} positions of {config.policy.model}; "
            "lower it"
        )
    check_adapter(config.policy)
    tokenizer = load_tokenizer(config.policy)
    end_ids = end_token_ids(config.policy, tokenizer)
    if not end_ids:
        raise ModelError(f"the tokenizer of {config.policy.model} has no end token, so no response could end; set one")
    adapter = config.policy.adapter
    learned = learned_by(adapter)
    examples = load_examples(config.data, tokenizer, end_ids, config.seed, learned)
    with RunFolder.open(given) as run:
        if adapter is not None and run.has_results:
            learned = learned_by(adapter, str(run.adapter))  # as in a detoxification
            examples = load_examples(config.data, tokenizer, end_ids, config.seed, learned)
        write_learned(run.path, examples.learned, learned)
        write_atomically(run.path / DEV_PROMPTS_FILE, dev_prompts(examples, tokenizer))
        terminal.stage(f"run folder {run.path}")
        terminal.stage(
            f"{len(examples.train)} examples to train on and {len(examples.dev)} for the dev loss, read as "
            f"{examples.format}, written with {examples.template}"
        )
        for reason, count in [*examples.left_out.items(), *examples.noted.items()]:
            terminal.stage(f"{count} x {reason}")
        yield TuningPlan(config, run, examples, int(tokenizer.pad_token_id))


def fit(plan: TuningPlan, reservation: Reservation) -> None:
    """Run the learners until the last step or until the dev loss has stopped falling; errors as `run_learners`."""
    task = TuningTask(
        plan.config, str(plan.run.path), plan.examples.train, plan.examples.dev, plan.pad_id, plan.total_steps
    )
    run_learners(sft_loop, task, plan.config.train, plan.run, reservation)
