"""The stream of scored rollouts: keeps batches in flight on the workers, pushes adapters, verifies both."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from detox_ray.config import RolloutConfig
from detox_ray.errors import DetoxError, SyncError
from detox_ray.policy.adapter import Adapter
from detox_ray.policy.policy import Canary
from detox_ray.records import Prompt, Rollout, Sampling, Score
from detox_ray.rollout.worker import Acknowledgement, RolloutPart

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Batch:
    """Scored rollouts of one step, the samples of a prompt next to each other.

    `rewards: [B] float32`; `staleness` in adapter versions; `metrics` holds what the scorer says of the batch and the
    seconds waited: `time_rollout_s`, `time_reward_s`.
    """

    rollouts: list[Rollout]
    rewards: np.ndarray
    staleness: int
    metrics: dict[str, float]


@dataclass
class _Part:
    """A worker's share of a batch, as asked for: enough to ask again."""

    worker: int
    prompts: Sequence[Prompt]
    samples: int
    sampling: Sampling
    reference: Any


@dataclass
class RolloutStream:
    """Batches of rollouts, at most `max_staleness` adapter versions old, from workers that may die and come back.

    `prompts_for_step` must be a pure function of the step, so that a resumed run sees the prompts it would have seen.
    """

    workers: list[Any]
    prompts_for_step: PromptSchedule
    scorer: Scorer
    config: RolloutConfig
    seed: int
    canary_tolerance: float
    version: int = -1
    _adapter: Any = None
    _canary: Canary | None = None
    _in_flight: dict[int, list[_Part]] = field(default_factory=dict)

    def connect(self) -> None:
        """Learn which version the workers serve; the next `publish` continues from there."""
        self.version = max(self._call(w.version) for w in self.workers)

    def publish(self, make_adapter: Callable[[int], Adapter], canary: Canary) -> int:
        """Push `make_adapter(next version)` to every worker through the object store, and verify it; the new version.

        Raises:
            SyncError: a worker acknowledges something else, or its canary differs from the learner's.
        """
        adapter = make_adapter(self.version + 1)
        self._adapter, self._canary = ray.put(adapter), canary
        references = [self._submit_adapter(index) for index in range(len(self.workers))]
        for index, reference in enumerate(references):
            try:
                self._verify(index, adapter, ray.get(reference, timeout=self.config.timeout_s))
            except (RayActorError, GetTimeoutError) as error:
                self._recover(index, error)
            except RayTaskError as error:
                raise _own_error(error) from None
        self.version = adapter.version
        return adapter.version

    def next_batch(self, step: int, last_step: int) -> Batch:
        """The scored batch of `step`; with `max_staleness` > 0 the following ones, up to `last_step`, are started too.

        Raises:
            SyncError: a rollout comes from a version that was not acknowledged or is too old.
            RewardError: a classifier failed for good.
        """
        for ahead in range(step, min(step + self.config.max_staleness, last_step) + 1):
            if ahead not in self._in_flight:
                self._in_flight[ahead] = self._submit(ahead)
        return self._collect(self._in_flight.pop(step))

    def sample(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> list[Rollout]:
        """`samples` responses to each prompt, outside of training, prompt by prompt."""
        parts = self._split(prompts, samples, sampling)
        return [rollout for part in parts for rollout in self._finish(part).rollouts]

    def _submit(self, step: int) -> list[_Part]:
        config = self.config
        sampling = Sampling(
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            config.top_k,
            config.fixed_length,
            seed=(self.seed * 1_000_003 + step) % 2**31,
        )
        return self._split(self.prompts_for_step(step), config.samples_per_prompt, sampling)

    def _split(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> list[_Part]:
        """Prompts in even, contiguous shares; each share has a seed of its own."""
        edges = np.linspace(0, len(prompts), len(self.workers) + 1).astype(int)
        parts = []
        for index, (start, end) in enumerate(pairwise(edges)):
            if end == start:
                continue
            own = replace(sampling, seed=(sampling.seed * 31 + index) % 2**31)
            share = prompts[start:end]
            parts.append(_Part(index, share, samples, own, self.workers[index].generate.remote(share, samples, own)))
        return parts

    def _collect(self, parts: list[_Part]) -> Batch:
        """Wait for the parts in the order they finish, and have each scored while the others go on."""
        start = time.perf_counter()
        waiting = {part.reference: position for position, part in enumerate(parts)}
        finished: dict[int, tuple[RolloutPart, Any]] = {}
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=self.config.timeout_s)
            for reference in ready or list(waiting):
                position = waiting.pop(reference)
                done = self._finish(parts[position])
                texts = [r.text for r in done.rollouts]
                future = self.scorer.submit(texts, [r.prompt_text for r in done.rollouts])
                finished[position] = (done, future)
        sampled = time.perf_counter()
        ordered = [finished[position] for position in range(len(parts))]
        rollouts = [rollout for done, _ in ordered for rollout in done.rollouts]
        scores = [score for _, future in ordered for score in self.scorer.result(future)]
        oldest = min(r.adapter_version for r in rollouts)
        if oldest < 0 or max(r.adapter_version for r in rollouts) > self.version:
            raise SyncError(f"a rollout comes from adapter version {oldest}, which was never acknowledged")
        if self.version - oldest > self.config.max_staleness:
            raise SyncError(
                f"a rollout is {self.version - oldest} adapter versions old; max_staleness={self.config.max_staleness}"
            )
        rewards, metrics = self.scorer.reward(rollouts, scores)
        metrics |= {"time_rollout_s": sampled - start, "time_reward_s": time.perf_counter() - sampled}
        return Batch(rollouts, rewards, self.version - oldest, metrics)

    def _finish(self, part: _Part) -> RolloutPart:
        """The result of a part; a worker that died or hangs is brought back and asked again."""
        while True:
            try:
                return ray.get(part.reference, timeout=self.config.timeout_s)
            except (RayActorError, GetTimeoutError) as error:
                self._recover(part.worker, error)
                worker = self.workers[part.worker]
                part.reference = worker.generate.remote(part.prompts, part.samples, part.sampling)
            except RayTaskError as error:
                raise _own_error(error) from None

    def _recover(self, index: int, cause: Exception) -> None:
        """Wait until Ray has restarted a worker and give it the current adapter; a hung one is killed first."""
        logger.warning("rollout worker %d: %s; restarting it", index, type(cause).__name__)
        if isinstance(cause, GetTimeoutError):
            ray.kill(self.workers[index], no_restart=False)
        deadline = time.monotonic() + self.config.timeout_s
        while True:
            try:
                if self._adapter is not None and self._call(self.workers[index].version) == -1:
                    acknowledged = ray.get(self._submit_adapter(index), timeout=self.config.timeout_s)
                    self._verify(index, ray.get(self._adapter), acknowledged)
                return
            except (RayActorError, GetTimeoutError) as error:
                if time.monotonic() > deadline:
                    raise SyncError(
                        f"rollout worker {index} did not come back within {self.config.timeout_s:.0f} s ({error}); "
                        "see its log in the run folder's Ray session"
                    ) from None
                time.sleep(1.0)

    def _submit_adapter(self, index: int) -> Any:
        assert self._canary is not None
        return self.workers[index].apply.remote(self._adapter, self._canary.prefixes)

    def _verify(self, index: int, adapter: Adapter, acknowledged: Acknowledgement) -> None:
        if (acknowledged.version, acknowledged.digest) != (adapter.version, adapter.digest):
            raise SyncError(
                f"rollout worker {index} acknowledged adapter {acknowledged.version} ({acknowledged.digest[:12]}), "
                f"not {adapter.version} ({adapter.digest[:12]})"
            )
        assert self._canary is not None
        gap = canary_gap(acknowledged.canary, self._canary)
        if not gap <= self.canary_tolerance:
            raise SyncError(
                f"rollout worker {index} answers the canary {gap:.3g} nats off the learner after adapter version "
                f"{adapter.version} (tolerance {self.canary_tolerance:g}): it does not serve the learner's policy; "
                "on a quantised policy use rollout.base=dequantized, or raise rollout.canary_tolerance"
            )

    def _call(self, method: Any) -> Any:
        return ray.get(method.remote(), timeout=self.config.timeout_s)


def canary_gap(answers: list[dict[int, float]], canary: Canary) -> float:
    """Largest |difference| in nats between a worker's answers and the learner's log-probabilities; infinite for NaN."""
    gaps = [
        abs(logprob - float(expected[token]))
        for answer, expected in zip(answers, canary.logprobs, strict=True)
        for token, logprob in answer.items()
    ]
    return float("inf") if any(gap != gap for gap in gaps) else max(gaps)


def _own_error(error: RayTaskError) -> Exception:
    """The error of ours that a remote call raised, or the call's own."""
    return error.cause if isinstance(error.cause, DetoxError) else error
