"""The stream of scored rollouts: keeps batches in flight, and has responses scored while others are sampled.

Two threads work while the learner learns: one waits for what the rollout workers were asked, in the order they were
asked (acknowledge an adapter, sample a batch), the other for the scores. A push blocks nobody: each worker applies the
adapter after its queued calls and goes on. Before the next batch is trained on, every acknowledgement has been checked.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from functools import cached_property
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

from detox_ray.config import RolloutConfig
from detox_ray.errors import SyncError
from detox_ray.policy.adapter import Adapter
from detox_ray.records import Batch, Canary, Prompt, Rollout, Sampling, Score
from detox_ray.rollout.pool import Push, SamplingCall, WorkerPool

PromptSchedule = Callable[[int], Sequence[Prompt]]


class Scorer(Protocol):
    """What scores responses while others are still being sampled."""

    def submit(self, texts: Sequence[str], prompts: Sequence[str]) -> Any:
        """Start scoring; returns a future."""
        ...

    def result(self, pending: Any) -> list[Score]:
        """Wait for a future of `submit`; one score per text.

        Raises:
            RewardError: a classifier failed.
        """
        ...

    def reward(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> tuple[np.ndarray, dict[str, float]]:
        """[B] float32, shaping included, and metrics of the batch."""
        ...


class Evaluation(Protocol):
    """What looks at the policy while it is trained; see `HeldoutEvaluation`."""

    @property
    def prompts(self) -> Sequence[Prompt]: ...

    @property
    def sampling(self) -> Sampling: ...

    def judge(self, rollouts: Future[list[Rollout]], version: int, step: int, reward: float) -> None: ...

    def finished(self, until: int) -> list[dict[str, float]]: ...


@dataclass(frozen=True)
class Sampled:
    """A batch's responses, call by call, the futures of the scores of each of their chunks, and when it was ready.

    On the performance counter: `acknowledged`, every worker had shown that it serves the adapter; `ended`, the last
    response was there.
    """

    calls: list[SamplingCall]
    scores: list[list[Any]]
    acknowledged: float
    ended: float

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """Prompt by prompt."""
        return [rollout for call in self.calls for rollout in call.rollouts()]


@dataclass(frozen=True)
class Rewarded:
    """The rewards of a sampled batch, `[B] float32`, and metrics of it."""

    sampled: Sampled
    rewards: np.ndarray
    metrics: dict[str, float]


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
    _in_flight: dict[int, Future[Rewarded]] = field(default_factory=dict)
    _verified: Future[float] | None = None  # when the last push was acknowledged

    def __getstate__(self) -> dict[str, Any]:
        public = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
        return {**public, "_in_flight": {}, "_verified": None}

    @cached_property
    def _sampling_thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "sampling")

    @cached_property
    def _scoring_thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "scoring")

    def connect(self) -> None:
        """See `WorkerPool.connect`."""
        self.pool.connect()

    def publish(self, make_adapter: Callable[[int], Adapter], canary: Canary) -> int:
        """Send the next adapter, with which the batches started from now on are sampled; its version."""
        push = self.pool.push(make_adapter, canary)
        self._verified = self._sampling_thread.submit(self._acknowledged, push)
        return push.version

    def verify(self) -> None:
        """Wait until the workers have acknowledged the last adapter.

        Raises:
            SyncError, ModelError: as `WorkerPool.verify`.
        """
        if self._verified is not None:
            self._verified.result()

    def start(self, step: int, last_step: int) -> None:
        """Have the batch of `step` sampled, and with `max_staleness` > 0 the following ones, up to `last_step`."""
        for ahead in range(step, min(step + self.config.max_staleness, last_step) + 1):
            if ahead not in self._in_flight:
                prompts = self.prompts_for_step(ahead)
                calls = self.pool.submit(prompts, self.config.samples_per_prompt, self._sampling(ahead))
                sampled = self._sampling_thread.submit(self._sampled, calls, self._verified)
                self._in_flight[ahead] = self._scoring_thread.submit(self._rewarded, sampled)

    def next_batch(self, step: int, last_step: int) -> Batch:
        """The scored batch of `step`, started now if it was not; see `start`.

        Raises:
            SyncError: a worker does not serve the adapter it was sent, or a rollout is of another version or too old.
            RewardError: a classifier failed for good.
            ModelError: a worker cannot be brought back.
        """
        self.start(step, last_step)
        asked = time.perf_counter()
        rewarded = self._in_flight.pop(step).result()
        sampled = rewarded.sampled
        acknowledged = max(asked, sampled.acknowledged)
        ended = max(acknowledged, sampled.ended)
        rollouts = sampled.rollouts
        staleness = self._checked_staleness(rollouts)
        metrics = {
            **rewarded.metrics,
            "time_acknowledge_s": acknowledged - asked,
            "time_rollout_s": ended - acknowledged,
            "time_reward_s": time.perf_counter() - ended,
            "worker_restarts": float(self.pool.restarts),
        }
        return Batch(rollouts, rewarded.rewards, staleness, metrics)

    def discard(self) -> int:
        """Forget the batches under way, whose steps the adapter published next samples anew; their number."""
        wait(self._in_flight.values())
        count = len(self._in_flight)
        self._in_flight.clear()
        return count

    def evaluate(self, step: int, reward: float) -> None:
        """Begin an evaluation of the adapter sent last; batches that are started later are sampled behind it."""
        if self.evaluation is not None:
            calls = self.pool.submit(self.evaluation.prompts, 1, self.evaluation.sampling)
            rollouts = self._sampling_thread.submit(self._evaluated, calls, self._verified)
            self.evaluation.judge(rollouts, self.pool.version, step, reward)

    def evaluations(self, until: int = 0) -> list[dict[str, float]]:
        """The evaluations finished since the last call, a dict each; those of steps before `until` are waited for."""
        return self.evaluation.finished(until) if self.evaluation is not None else []

    def _sampling(self, step: int) -> Sampling:
        return sampling_of(self.config, seed=(self.seed * 1_000_003 + step) % 2**31)

    def _acknowledged(self, push: Push) -> float:
        self.pool.verify(push)
        return time.perf_counter()

    def _sampled(self, calls: list[SamplingCall], verified: Future[float] | None) -> Sampled:
        """Wait for the calls chunk by chunk, and have each chunk scored while sampling goes on."""
        acknowledged = verified.result() if verified is not None else time.perf_counter()
        scores: list[list[Any]] = [[] for _ in calls]
        for index, chunk in self.pool.chunks(calls):
            if chunk is None:
                scores[index].clear()
            else:
                rollouts = [rollout for _, rollout in chunk]
                future = self.scorer.submit([r.text for r in rollouts], [r.prompt_text for r in rollouts])
                scores[index].append(future)
        ended = time.perf_counter()
        if self.config.in_turns:
            self.pool.sleep()
        return Sampled(calls, scores, acknowledged, ended)

    def _evaluated(self, calls: list[SamplingCall], verified: Future[float] | None) -> list[Rollout]:
        """Wait for the responses of an evaluation."""
        if verified is not None:
            verified.result()
        return self.pool.rollouts(calls)

    def _rewarded(self, future: Future[Sampled]) -> Rewarded:
        sampled = future.result()
        scores = [s for call, own in zip(sampled.calls, sampled.scores, strict=True) for s in self._scores(call, own)]
        return Rewarded(sampled, *self.scorer.reward(sampled.rollouts, scores))

    def _scores(self, call: SamplingCall, pending: list[Any]) -> list[Score]:
        """The scores of a call's responses, prompt by prompt."""
        indexes = [index for chunk in call.chunks for index, _ in chunk]
        scores = [score for part in pending for score in self.scorer.result(part)]
        return [score for _, score in sorted(zip(indexes, scores, strict=True), key=itemgetter(0))]

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
