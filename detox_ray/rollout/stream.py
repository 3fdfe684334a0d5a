"""The stream of scored rollouts: keeps batches in flight, and has responses scored while others are sampled.

A batch under way is gathered by a thread of its own, so that it is sampled and scored while the learner learns. Nobody
waits for a push either: a worker takes an adapter when it has done what it was asked before, and goes on with the next
batch whatever the others do; that all have taken it is made sure before that batch is trained on.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from operator import itemgetter
from threading import Event
from typing import Any, Protocol

import numpy as np

from detox_ray.config import RolloutConfig
from detox_ray.errors import SyncError
from detox_ray.policy.adapter import Adapter
from detox_ray.records import Canary, Prompt, Rollout, Sampling, Score
from detox_ray.rollout.pool import Part, Push, WorkerPool

PromptSchedule = Callable[[int], Sequence[Prompt]]


class Scorer(Protocol):
    """What scores responses while others are still being sampled."""

    def submit(self, texts: Sequence[str], prompts: Sequence[str]) -> Any:
        """Start scoring; returns a future."""
        ...

    def result(self, response: Any) -> list[Score]:
        """Wait for a future of `submit`; one score a text.

        Raises:
            RewardError: a classifier failed.
        """
        ...

    def reward(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> tuple[np.ndarray, dict[str, float]]:
        """[B] float32, shaping included, and metrics of the batch."""
        ...


class Evaluation(Protocol):
    """What looks at the policy while it is trained; see `HeldoutEvaluation`."""

    def start(self, pool: WorkerPool, step: int, reward: float) -> None: ...

    def finished(self, wait: bool = False) -> list[dict[str, float]]: ...


@dataclass(frozen=True)
class Batch:
    """Scored rollouts of one step, the samples of a prompt next to each other.

    `rewards: [B] float32`; `staleness` in adapter versions; `metrics` holds what the scorer says of the batch, the
    seconds the learner waited (`time_acknowledge_s`, `time_rollout_s` and `time_reward_s`, one after the other) and
    `worker_restarts`.
    """

    rollouts: list[Rollout]
    rewards: np.ndarray
    staleness: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Gathered:
    """What became of a step's prompts, and when, on the performance counter.

    `acknowledged`: every worker had shown that it serves the adapter; `sampled`: the last response was there.
    """

    rollouts: list[Rollout]
    rewards: np.ndarray
    metrics: dict[str, float]
    acknowledged: float
    sampled: float


@dataclass
class RolloutStream:
    """Batches of rollouts, at most `max_staleness` adapter versions old.

    `prompts_for_step` must be a pure function of the step, so that a resumed run sees the prompts it would have seen.
    """

    pool: WorkerPool
    prompts_for_step: PromptSchedule
    scorer: Scorer
    config: RolloutConfig
    seed: int
    evaluation: Evaluation | None = None
    _in_flight: dict[int, Future[Gathered]] = field(default_factory=dict)
    _push: Push | None = None  # the last one, until a batch after it is started
    _sampled: Event | None = None  # whether the batch started last is sampled
    _executor: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_in_flight": {}, "_push": None, "_sampled": None, "_executor": None}

    def connect(self) -> None:
        """See `WorkerPool.connect`."""
        self.pool.connect()

    def publish(self, make_adapter: Callable[[int], Adapter], canary: Canary) -> int:
        """Send the next adapter, with which the batches started from now on are sampled; its version."""
        self._push = self.pool.push(make_adapter, canary)
        return self._push.version

    def verify(self) -> None:
        """Wait until the workers have acknowledged the last adapter, where no batch after it sees to that.

        Raises:
            SyncError, ModelError: as `WorkerPool.verify`.
        """
        if self._push is not None:
            self.pool.verify(self._push)
            self._push = None

    def start(self, step: int, last_step: int) -> None:
        """Have the batch of `step` sampled, and with `max_staleness` > 0 the following ones, up to `last_step`."""
        for ahead in range(step, min(step + self.config.max_staleness, last_step) + 1):
            if ahead not in self._in_flight:
                prompts = self.prompts_for_step(ahead)
                parts = self.pool.submit(prompts, self.config.samples_per_prompt, self._sampling(ahead))
                before, self._sampled = self._sampled, Event()
                push, self._push = self._push, None
                self._in_flight[ahead] = self._threads().submit(self._gather, parts, push, before, self._sampled)

    def next_batch(self, step: int, last_step: int) -> Batch:
        """The scored batch of `step`, started now if it was not; see `start`.

        Raises:
            SyncError: a worker does not serve the adapter it was sent, or a rollout is of another version or too old.
            RewardError: a classifier failed for good.
            ModelError: a worker cannot be brought back.
        """
        self.start(step, last_step)
        asked = time.perf_counter()
        gathered = self._in_flight.pop(step).result()
        acknowledged = max(asked, gathered.acknowledged)
        sampled = max(acknowledged, gathered.sampled)
        staleness = self._checked_staleness(gathered.rollouts)
        metrics = {
            **gathered.metrics,
            "time_acknowledge_s": acknowledged - asked,
            "time_rollout_s": sampled - acknowledged,
            "time_reward_s": time.perf_counter() - sampled,
            "worker_restarts": float(self.pool.restarts),
        }
        return Batch(gathered.rollouts, gathered.rewards, staleness, metrics)

    def discard(self) -> int:
        """Forget the batches under way, whose steps the adapter published next samples anew; their number."""
        wait(self._in_flight.values())
        count = len(self._in_flight)
        self._in_flight.clear()
        return count

    def evaluate(self, step: int, reward: float) -> None:
        """Begin an evaluation of the adapter that was sent last."""
        if self.evaluation is not None:
            self.evaluation.start(self.pool, step, reward)

    def evaluations(self, wait: bool = False) -> list[dict[str, float]]:
        """The evaluations finished since the last call, a dict each; with `wait`, all that were begun."""
        return self.evaluation.finished(wait) if self.evaluation is not None else []

    def _threads(self) -> ThreadPoolExecutor:
        """One for each batch that may be under way."""
        self._executor = self._executor or ThreadPoolExecutor(self.config.max_staleness + 1, "rollouts")
        return self._executor

    def _sampling(self, step: int) -> Sampling:
        return sampling_of(self.config, seed=(self.seed * 1_000_003 + step) % 2**31)

    def _gather(self, parts: list[Part], push: Push | None, before: Event | None, all_sampled: Event) -> Gathered:
        """Wait for the parts chunk by chunk, and have each chunk scored while sampling goes on.

        Not until the batch `before` is sampled and then the `push` acknowledged: a worker's silence means nothing
        behind what it was asked before.
        """
        try:
            if before is not None:
                before.wait()
            if push is not None:
                self.pool.verify(push)
            acknowledged = time.perf_counter()
            futures = self._sampled_parts(parts)
        finally:
            all_sampled.set()
        sampled = time.perf_counter()
        if self.config.in_turns:
            self.pool.sleep()
        rollouts = [rollout for part in parts for rollout in part.rollouts()]
        scores = [score for part, own in zip(parts, futures, strict=True) for score in self._scores(part, own)]
        rewards, metrics = self.scorer.reward(rollouts, scores)
        return Gathered(rollouts, rewards, metrics, acknowledged, sampled)

    def _sampled_parts(self, parts: list[Part]) -> list[list[Any]]:
        """Wait until the parts are complete; the futures of their scores, one for each chunk of each part."""
        futures: list[list[Any]] = [[] for _ in parts]
        for place, chunk in self.pool.chunks(parts):
            if chunk is None:
                futures[place].clear()
            else:
                rollouts = [rollout for _, rollout in chunk]
                future = self.scorer.submit([r.text for r in rollouts], [r.prompt_text for r in rollouts])
                futures[place].append(future)
        return futures

    def _scores(self, part: Part, futures: list[Any]) -> list[Score]:
        """The scores of a part, prompt by prompt."""
        places = [place for chunk in part.chunks for place, _ in chunk]
        scores = [score for future in futures for score in self.scorer.result(future)]
        return [score for _, score in sorted(zip(places, scores, strict=True), key=itemgetter(0))]

    def _checked_staleness(self, rollouts: Sequence[Rollout]) -> int:
        versions = {r.adapter_version for r in rollouts}
        if min(versions) < 0 or max(versions) > self.pool.version:
            raise SyncError(f"rollouts of adapter versions {sorted(versions)}: one of them was never sent")
        staleness = self.pool.version - min(versions)
        if staleness > self.config.max_staleness:
            raise SyncError(f"a rollout is {staleness} adapter versions old; max_staleness={self.config.max_staleness}")
        return staleness


def sampling_of(config: RolloutConfig, seed: int) -> Sampling:
    """How a configuration samples."""
    return Sampling(
        config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.fixed_length, seed=seed
    )
