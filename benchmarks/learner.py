"""Seconds of one PPO update by itself: a configuration and changes of it, in turn, in one process.

    python benchmarks/learner.py CONFIG [KEY=VALUE ...] [--change KEY=VALUE,KEY=VALUE ...] [--steps N] [--out FILE]

The learner is the real one, with the allocator's settings of a run; prompts are those of the configuration, responses
are random tokens of `rollout.max_new_tokens`, rewards random numbers. Nothing else runs: no engine, no reward, no Ray.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from machine import describe, machine, spread, write_json
from transformers.utils import logging

from detox_ray import load_config
from detox_ray.config import Config
from detox_ray.data.lab import resolve_lab
from detox_ray.data.prompts import load_prompts
from detox_ray.learner.ppo import PPO, SamplingDistribution
from detox_ray.policy.load import load_tokenizer
from detox_ray.policy.policy import Policy
from detox_ray.records import Prompt, Rollout
from detox_ray.trainer import LEARNER_ENVIRONMENT

WARMUP = 2  # updates of each that are left out: the first compiles


def main() -> None:
    """Update each learner in turn, print and write what it took."""
    options = _options()
    if not LEARNER_ENVIRONMENT.items() <= os.environ.items():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | LEARNER_ENVIRONMENT)
    logging.disable_progress_bar()
    facts = machine(("torch", "transformers", "peft", "bitsandbytes"))
    print(describe(facts))
    configs = {
        change: resolve_lab(load_config(options.config, [*options.overrides, *filter(None, change.split(","))]))
        for change in ["", *options.change]
    }
    config = configs[""]
    torch.set_num_threads(config.train.threads)
    tokenizer = load_tokenizer(config.policy)
    prompts = load_prompts(config.data, tokenizer, config.seed).train
    learners = {change: _learner(c, options.steps) for change, c in configs.items()}
    seconds: dict[str, list[float]] = {change: [] for change in learners}
    for step in range(WARMUP + options.steps):
        rollouts, rewards = _batch(config, prompts, len(tokenizer), step)
        for change, learner in learners.items():
            started = time.perf_counter()
            learner.update(rollouts, rewards, step, on_policy=False)
            seconds[change].append(time.perf_counter() - started)
    first = spread(seconds[""][WARMUP:])["median"]
    result = {change: spread(values[WARMUP:]) | {"first_s": values[0]} for change, values in seconds.items()}
    for change, found in result.items():
        print(
            f"{found['median']:.2f} s ({found['min']:.2f} - {found['max']:.2f}), x {first / found['median']:.2f}, "
            f"the first one {found['first_s']:.0f} s: {change or 'as configured'}"
        )
    write_json(options.out, {"machine": facts, "overrides": options.overrides, "updates": result})
    print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", help="dotted overrides")
    parser.add_argument("--change", action="append", default=[], help="overrides of another learner, with commas")
    parser.add_argument("--steps", type=int, default=8, help="measured updates of each (8)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/learner.json"), help="the JSON file")
    return parser.parse_args()


def _learner(config: Config, steps: int) -> PPO:
    policy = Policy(config.policy, torch.device("cpu"), config.seed, compiled=config.train.compile)
    rollout = config.rollout
    distribution = SamplingDistribution(rollout.temperature, (), rollout.samples_per_prompt, rollout.max_logprob_gap)
    return PPO(policy, config.ppo, distribution, pad_id=0, total_steps=WARMUP + steps, seed=config.seed)


def _batch(config: Config, prompts: Sequence[Prompt], vocabulary: int, step: int) -> tuple[list[Rollout], np.ndarray]:
    """Rollouts of one step and their rewards."""
    rng = np.random.default_rng(step)
    length = config.rollout.max_new_tokens
    chosen = rng.integers(len(prompts), size=config.ppo.batch_size)
    rollouts = [
        Rollout(
            prompt_id=prompts[i].id,
            prompt_text=prompts[i].text,
            prompt_ids=np.array(prompts[i].token_ids),
            response_ids=rng.integers(vocabulary, size=length),
            logprobs=np.full(length, -np.log(vocabulary), dtype=np.float32),
            text="",
            finish_reason="length",
            adapter_version=step,
        )
        for i in chosen
    ]
    return rollouts, rng.normal(size=len(rollouts)).astype(np.float32)


if __name__ == "__main__":
    main()
