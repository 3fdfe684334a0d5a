"""The run, told in the order it happens: a language model goes in, a less toxic one comes out, with the evidence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ray import serve

from detox_ray.cluster import announce_shortage, ray_session
from detox_ray.config import Config, RewardConfig
from detox_ray.data.lab import resolve_lab
from detox_ray.evaluation.during_training import HeldoutEvaluation
from detox_ray.evaluation.summary import evaluation_table
from detox_ray.learner.train_loop import LearnerTask, train_loop
from detox_ray.measurement import answer, judge_and_report, rollout_workers
from detox_ray.meter_config import meter_of_run
from detox_ray.placement import check_placements, learner_placement, placements, rollout_placement
from detox_ray.plan import Plan, canary_tolerance, prepare, with_dequantized_base
from detox_ray.policy.adapter import is_whole
from detox_ray.reservation import Reservation, reserve
from detox_ray.rewards.classifiers import score_texts
from detox_ray.rewards.ensemble import with_calibrations
from detox_ray.rollout.pool import WorkerPool
from detox_ray.rollout.stream import RolloutStream, sampling_of
from detox_ray.run_copy import mirrored_to_storage
from detox_ray.schedule import Schedule
from detox_ray.serving.app_guard import end_spare_guard, guard_app
from detox_ray.serving.controller_watch import SHORTEST_PATIENCE_S, controller_watched
from detox_ray.serving.reward_app import deploy_reward_app
from detox_ray.serving.reward_client import RewardClient, fit_calibrations
from detox_ray.serving.rollout_scorer import RolloutScorer
from detox_ray.terminal import Terminal
from detox_ray.timeline import keep_worker_tasks
from detox_ray.trainer import run_learners


def train(config: Config, quiet: bool = False) -> dict[str, Any]:
    """Train, evaluate and report; a run that was killed continues from its folder.

    Args:
        config: of the run; its folder is `config.run_dir`.
        quiet: print nothing.

    Returns:
        The content of `evaluation.json`.

    Raises:
        ConfigError, DataError, ModelError: something does not fit; nothing expensive has started.
        RewardError, SyncError, StorageError: the run was stopped; it can be continued once the cause is mended.
        DivergenceError: it was stopped because it diverged twice; its folder holds the last good adapter.
        DetoxError: a process of it crashed too often.
    """
    terminal = Terminal(quiet)
    with prepare(config, terminal) as plan, mirrored_to_storage(plan.run.copy, plan.run.path):
        return run(plan, terminal)


def run(plan: Plan, terminal: Terminal) -> dict[str, Any]:
    """Run a checked plan; if it is already complete, return its stored evaluation."""
    config = plan.config
    if (finished := plan.run.read_evaluation(config.train.total_steps)) is not None and is_whole(plan.run.adapter):
        terminal.stage(f"{plan.run.path} is complete; remove it to run again")
        terminal.console.print(evaluation_table(finished))
        return finished
    needed = placements(config)
    placed = [learner_placement(config.train), rollout_placement(config.rollout)]
    with ray_session(config.ray, partial(check_placements, needed), plan.run.ray_logs) as ray_stays:
        announce_shortage(needed, terminal)
        engine = with_dequantized_base(plan.engine, config.policy, config.rollout, plan.run, plan.learner_device)
        plan = replace(plan, engine=engine)
        terminal.stage("starting rollout workers and reward classifiers")
        with (
            reserve(placed, terminal.stage) as reservation,
            rollout_workers(plan.engine, config.rollout, reservation) as workers,
            reward_app(plan, guarded=ray_stays),
        ):
            pool = worker_pool(plan, workers)
            meter = meter_of_run(plan.run, config)
            *before, after = meter.systems
            heldout = plan.prompts.heldout[: meter.prompts]
            answers = [answer(pool, plan.engine, system, heldout, meter, plan.run, terminal) for system in before]
            stream = rollout_stream(plan, pool, calibrated_reward(pool, plan))
            terminal.stage(f"training for {config.train.total_steps} steps")
            with terminal.follow_steps(plan.run.metrics_file, config.train.total_steps):
                fit(plan, stream, reservation)
            keep_worker_tasks(plan.run, plan.app_name)
            terminal.stage("verifying the saved adapter on the workers")
            pool.connect()
            answers.append(answer(pool, plan.engine, after, heldout, meter, plan.run, terminal))
    evaluation = judge_and_report(meter, plan.run, answers, terminal, steps=plan.run.trained_steps())
    terminal.stage(f"adapter: {plan.run.adapter}")
    return evaluation


def fit(plan: Plan, stream: RolloutStream, reservation: Reservation) -> None:
    """Run the learner under Ray Train until the last step.

    Raises:
        RewardError, SyncError, ModelError: the learner met an error that a new attempt would meet again.
        DetoxError: the learner crashed more often than `train.max_failures`.
    """
    task = LearnerTask(
        plan.config, str(plan.run.path), stream, plan.engine.end_ids, plan.engine.pad_id, plan.canary_length
    )
    run_learners(train_loop, task, plan.config.train, plan.run, reservation)


@contextmanager
def reward_app(plan: Plan, guarded: bool) -> Iterator[None]:
    """The reward ensemble on Serve; `guarded`, where Serve would outlive this process."""
    if guarded:
        guard_app(plan.app_name)
    # Twice as patient as the watch, a scoring call waits until the controller is back and replaces a lost replica.
    with controller_watched(max(SHORTEST_PATIENCE_S, plan.config.reward.timeout_s / 2)):
        deploy_reward_app(plan.config.reward, plan.app_name)
        try:
            yield
        finally:
            serve.delete(plan.app_name)
            end_spare_guard(plan.app_name)


def calibrated_reward(pool: WorkerPool, plan: Plan) -> RewardConfig:
    """The reward with each `calibration: fit` made numbers by the untrained policy's answers to training prompts."""
    reward = plan.config.reward
    fitted = plan.run.read_calibrations()
    if fitted is None and not any(c.calibration == "fit" for c in reward.classifiers):
        return reward
    if fitted is None:
        prompts = plan.prompts.train[: reward.calibration_prompts]
        rollouts = pool.sample(prompts, 1, sampling_of(plan.config.rollout, seed=plan.config.seed))
        texts, asked = [r.text for r in rollouts], [r.prompt_text for r in rollouts]
        fitted = fit_calibrations(reward, plan.app_name, texts, asked)
        plan.run.write_calibrations(fitted)
    return with_calibrations(reward, fitted)


def score(config: Config, texts: Sequence[str]) -> list[dict[str, float]]:
    """Score texts with the judge and the reward's classifiers, in this process.

    Returns:
        For each text the probability of toxicity by each classifier, by name.

    Raises:
        ConfigError, ModelError: a classifier cannot be loaded.
    """
    config = resolve_lab(config)
    return score_texts([*config.reward.classifiers, config.evaluation.judge], texts)


def worker_pool(plan: Plan, workers: list[Any]) -> WorkerPool:
    """The workers, once every engine has started."""
    tolerance = canary_tolerance(plan.config.policy, plan.config.rollout, plan.engine)
    pool = WorkerPool(workers, plan.config.rollout, tolerance)
    pool.connect()
    return pool


def rollout_stream(plan: Plan, pool: WorkerPool, reward: RewardConfig) -> RolloutStream:
    """Batches of training prompts' responses with their rewards."""
    config = plan.config
    per_step = config.ppo.batch_size // config.rollout.samples_per_prompt
    return RolloutStream(
        pool=pool,
        prompts_for_step=Schedule(plan.prompts.train, per_step, config.seed),
        scorer=RolloutScorer(
            RewardClient(plan.app_name, reward), reward.shaping, plan.engine.end_ids, config.evaluation.judge
        ),
        config=config.rollout,
        seed=config.seed,
        evaluation=HeldoutEvaluation(
            config.evaluation.judge,
            plan.prompts.heldout[: config.evaluation.every_prompts],
            sampling=sampling_of(config.rollout, seed=config.seed),
            timeout_s=config.rollout.timeout_s,
        ),
    )
