"""The rollout workers as one: responses from all, verified pushes to all, and dead ones brought back."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from detox_ray.config import RolloutConfig
from detox_ray.errors import DetoxError, ModelError, SyncError, last_line
from detox_ray.policy.adapter import Adapter
from detox_ray.records import Canary, Prompt, Rollout, Sampling
from detox_ray.rollout.engine import in_order
from detox_ray.rollout.worker import Acknowledgement, Chunk

logger = logging.getLogger(__name__)

LOST = (RayActorError, GetTimeoutError)  # what tells that a worker has died, or hangs
ATTEMPTS = 3  # a worker that goes down this often and finishes no call in between is given up
POLL_S = 0.5
# A call asks for at most this many times what an engine advances together: a lost worker costs no more than that, and
# the engine is hardly ever short of sequences.
ROUNDS_A_CALL = 4


@dataclass(frozen=True)
class Push:
    """An adapter under way: where it is in the object store, what every worker must answer, and where the answers come.

    `restarts`: how often each worker had been restarted when it was asked.
    """

    adapter_ref: Any
    version: int
    digest: str
    canary: Canary
    previous: Canary | None
    answer_refs: list[Any]
    restarts: list[int]


@dataclass
class SamplingCall:
    """What one worker is asked for at once, enough to ask again, and what came of it.

    `restarts`: how often the worker had been restarted when it was asked; `chunks`: what has come since then.
    """

    worker: int
    prompts: Sequence[Prompt]
    samples: int
    sampling: Sampling
    chunks_ref: Any = None
    restarts: int = 0
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether all responses are there."""
        return sum(len(chunk) for chunk in self.chunks) == len(self.prompts) * self.samples

    def rollouts(self) -> list[Rollout]:
        """The responses received, prompt by prompt."""
        return in_order(chain(*self.chunks))


def seed_of_call(seed: int, call: int) -> int:
    """A seed in [0, 2^31), distinct for every call of a batch and from those of neighbouring batches.

    31 consecutive seeds per batch, further calls in blocks far away.
    """
    block, index = divmod(call, 31)
    return (seed * 31 + index + block * 15_485_863) % 2**31


class WorkerPool:
    """N worker actors that are sent one adapter after the other. Picklable; its copies share the actors.

    Threads may wait for calls while another pushes.
    """

    def __init__(self, workers: list[Any], config: RolloutConfig, canary_tolerance: float) -> None:
        """`canary_tolerance`: largest difference between a worker's answer and the learner's, in nats."""
        self.version = -1
        self._workers = workers
        self._config = config
        self._tolerance = canary_tolerance
        self._push: Push | None = None
        self._restarts = [0] * len(workers)
        self._mending = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_push": None, "_mending": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _mending=threading.RLock())

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self._workers)

    @property
    def restarts(self) -> int:
        """How often a worker was lost and brought back, since the learner started."""
        return sum(self._restarts)

    def connect(self) -> None:
        """Wait until every engine has started, and learn which version they serve; the next push continues from there.

        A killed learner may have left pushes queued; their versions are skipped, so a late one counts as old and is
        refused.

        Raises:
            ModelError: an engine does not start.
        """
        served = max(self._served_version(index) for index in range(self.size))
        self.version = served + self._config.max_staleness + 1

    def publish(self, make_adapter: Callable[[int], Adapter], canary: Canary) -> int:
        """Push `make_adapter(next version)` to every worker and wait for all; returns the version.

        Raises:
            SyncError, ModelError: as `verify`.
        """
        push = self.push(make_adapter, canary)
        self.verify(push)
        return push.version

    def push(self, make_adapter: Callable[[int], Adapter], canary: Canary) -> Push:
        """Send `make_adapter(next version)` to every worker, once through the object store.

        Calls already queued run on the current adapter, later ones on this one.
        """
        with self._mending:
            adapter = make_adapter(self.version + 1)
            previous = self._push.canary if self._push else None
            adapter_ref = ray.put(adapter)
            answer_refs = [worker.apply.remote(adapter_ref, canary.prefixes) for worker in self._workers]
            restarts = list(self._restarts)
            self._push = Push(adapter_ref, adapter.version, adapter.digest, canary, previous, answer_refs, restarts)
            self.version = adapter.version
            return self._push

    def verify(self, push: Push) -> None:
        """Wait until every worker has shown that it serves the push; one that died serves it or a later one.

        To be called when the workers have done what they were asked before: none may be silent for `rollout.timeout_s`.

        Raises:
            SyncError: a worker acknowledges something else, or answers the canary unlike the learner.
            ModelError: a worker that died cannot be brought back.
        """
        for index, answer in self._answers(push.answer_refs, push.restarts):
            self._check(index, answer, push)

    def submit(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> list[SamplingCall]:
        """Start `samples` responses to each prompt: even, contiguous shares, in calls that each have a seed."""
        calls = self._calls(prompts, samples, sampling)
        for call in calls:
            self._ask(call)
        return calls

    def _calls(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> list[SamplingCall]:
        edges = np.linspace(0, len(prompts), self.size + 1).astype(int)
        size = max(1, ROUNDS_A_CALL * self._config.max_num_seqs // samples)
        calls: list[SamplingCall] = []
        for worker, (start, end) in enumerate(pairwise(edges)):
            for first in range(start, end, size):
                own = replace(sampling, seed=seed_of_call(sampling.seed, len(calls)))
                calls.append(SamplingCall(worker, prompts[first : min(first + size, end)], samples, own))
        return calls

    def chunks(self, calls: Sequence[SamplingCall]) -> Iterator[tuple[int, Chunk | None]]:
        """What comes of the calls, in the order it comes, each with the index of its call, until all are complete.

        A worker that died is brought back and asked for all of the call again; so is every worker once none has sent
        anything for `rollout.timeout_s`. The call begins anew then: None comes in the place of a chunk.

        Raises:
            ModelError: an engine does not start again, or goes down `ATTEMPTS` times and finishes no call in between.
        """
        restarts = list(self._restarts)  # of each worker when it last finished a call
        while waiting := {call.chunks_ref: index for index, call in enumerate(calls) if not call.is_complete}:
            ready, _ = ray.wait(list(waiting), timeout=self._config.timeout_s)
            for chunks_ref in ready or waiting:
                call = calls[waiting[chunks_ref]]
                chunk = self._next_chunk(call)
                if call.is_complete:
                    restarts[call.worker] = self._restarts[call.worker]
                elif chunk is None:
                    if self._restarts[call.worker] - restarts[call.worker] >= ATTEMPTS:
                        raise ModelError(
                            f"rollout worker {call.worker} went down {ATTEMPTS} times and finished no call in between; "
                            "lower rollout.max_num_seqs or raise rollout.timeout_s, and see ray-logs in the run folder"
                        )
                    self._ask(call)
                yield waiting[chunks_ref], chunk

    def _next_chunk(self, call: SamplingCall) -> Chunk | None:
        """The next chunk of a call; None if the worker was lost, and is back."""
        try:
            chunk = _next_of(call.chunks_ref)
            if self._push is not None and any(rollout.adapter_version < 0 for _, rollout in chunk):
                raise RayActorError  # it died while nobody asked, and was back on the pristine base when this call came
        except (*LOST, ObjectLostError) as error:
            self._restore(call.worker, error, call.restarts)
            return None
        call.chunks.append(chunk)
        return chunk

    def rollouts(self, calls: Sequence[SamplingCall]) -> list[Rollout]:
        """All responses of the calls, prompt by prompt; errors as `chunks`."""
        for _ in self.chunks(calls):
            pass
        return [rollout for call in calls for rollout in call.rollouts()]

    def sample(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> list[Rollout]:
        """`samples` responses to each prompt, prompt by prompt; errors as `chunks`."""
        return self.rollouts(self.submit(prompts, samples, sampling))

    def sleep(self) -> None:
        """Have every worker give its device's memory back until it is asked for something.

        Raises:
            ModelError: a worker was lost over it and cannot be brought back.
        """
        for _ in range(ATTEMPTS):
            restarts = list(self._restarts)
            asleep = list(self._answers([worker.sleep.remote() for worker in self._workers], restarts))
            if len(asleep) == self.size:
                return
        raise ModelError(
            f"rollout workers went down {ATTEMPTS} times on their way to sleep; see ray-logs in the run folder"
        )

    def _answers(self, answer_refs: Sequence[Any], restarts: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """What each worker answers, by its index; one that is lost over it is brought back and left out."""
        for index, answer_ref in enumerate(answer_refs):
            try:
                answer = _get(answer_ref, self._config.timeout_s)
            except LOST as error:
                self._restore(index, error, restarts[index])
            else:
                yield index, answer

    def _ask(self, call: SamplingCall) -> None:
        call.restarts = self._restarts[call.worker]
        call.chunks.clear()
        worker = self._workers[call.worker]
        call.chunks_ref = worker.generate_in_chunks.remote(call.prompts, call.samples, call.sampling)

    def _restore(self, index: int, cause: Exception, restarts: int) -> None:
        """Wait for Ray to restart a worker's engine and push it the current adapter; a hung one is killed first.

        `restarts` is the worker's number of restarts when it was asked: another thread may have seen to it since.
        """
        with self._mending:
            if self._restarts[index] == restarts:
                self._restarts[index] += 1
                logger.warning("rollout worker %d is lost (%s); waiting for it to restart", index, type(cause).__name__)
                self._bring_back(index, cause)

    def _bring_back(self, index: int, cause: Exception) -> None:
        if isinstance(cause, GetTimeoutError):
            ray.kill(self._workers[index], no_restart=False)
        for _ in range(ATTEMPTS):
            try:
                self._served_version(index)
                if (push := self._push) is not None:
                    answer_ref = self._workers[index].apply.remote(push.adapter_ref, push.canary.prefixes)
                    self._check(index, _get(answer_ref, self._config.timeout_s), push)
                return
            except LOST:
                continue
        raise ModelError(f"rollout worker {index} went down {ATTEMPTS} times while it was restarted; see its log")

    def _served_version(self, index: int) -> int:
        """What a worker serves, as soon as its engine has started; one that hangs in that is killed and starts anew.

        Raises:
            ModelError: the engine cannot start, or in none of `ATTEMPTS` within `rollout.start_timeout_s`.
        """
        for _ in range(ATTEMPTS):
            deadline = time.monotonic() + self._config.start_timeout_s
            while time.monotonic() < deadline:
                try:
                    return ray.get(self._workers[index].version.remote(), timeout=max(0.1, deadline - time.monotonic()))
                except RayActorError as error:
                    if error.actor_init_failed:
                        raise ModelError(f"rollout worker {index} does not start: {last_line(error)}") from None
                    problem = type(error).__name__
                except GetTimeoutError as error:
                    problem = type(error).__name__
                time.sleep(POLL_S)
            logger.warning("rollout worker %d does not start (%s) and is killed", index, problem)
            ray.kill(self._workers[index], no_restart=False)
        raise ModelError(
            f"rollout worker {index} did not start within rollout.start_timeout_s={self._config.start_timeout_s:g}, "
            f"{ATTEMPTS} times ({problem}); see ray-logs in the run folder"
        )

    def _check(self, index: int, answer: Acknowledgement, push: Push) -> None:
        if (answer.version, answer.digest) != (push.version, push.digest):
            raise SyncError(
                f"rollout worker {index} acknowledged adapter {answer.version} ({answer.digest[:12]}), "
                f"not {push.version} ({push.digest[:12]})"
            )
        gap = canary_gaps(answer.canary, push.canary)
        if not gap.max() <= self._tolerance:
            raise SyncError(
                f"rollout worker {index} answers the canary {gap.max():.3g} nats off the learner after adapter version "
                f"{push.version} (tolerance {self._tolerance:g}): it does not serve the learner's policy; "
                "on a quantised policy use rollout.base=dequantized, or raise rollout.canary_tolerance"
            )
        if push.previous is not None and is_stale(answer.canary, push.previous, push.canary):
            raise SyncError(f"rollout worker {index} acknowledged adapter {push.version} and serves the one before")


def _get(answer_ref: Any, timeout_s: float | None = None) -> Any:
    """As `ray.get`, but an error of ours that the call raised comes as itself."""
    try:
        return ray.get(answer_ref, timeout=timeout_s)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DetoxError) else error) from None


def _next_of(chunks_ref: Any) -> Chunk:
    """The chunk of an `ObjectRefGenerator` that is there.

    Raises:
        GetTimeoutError: none is; and what the call raised.
    """
    ready, _ = ray.wait([chunks_ref], timeout=0, fetch_local=False)
    if not ready:
        raise GetTimeoutError
    return _get(next(chunks_ref))


def canary_gaps(answers: list[dict[int, float]], canary: Canary) -> np.ndarray:
    """|difference| in nats of every answered log-probability to the canary's; NaN becomes infinite."""
    rows = zip(answers, canary.logprobs, strict=True)
    found, expected = np.array([(lp, row[token]) for answer, row in rows for token, lp in answer.items()]).T
    return np.nan_to_num(np.abs(found - expected), nan=np.inf)


def is_stale(answers: list[dict[int, float]], previous: Canary, current: Canary) -> bool:
    """Whether the answers are those of the previous adapter, as far as the two can be told apart.

    In bfloat16 one step can move the canary by less than the tolerance. With d the mean distance between the canaries
    on the answered tokens, a worker on the right adapter cannot be within d/4 of the previous one and 3d/4 off its own
    unless its rounding errors happen to point the very way the adapter moved.
    """
    tokens = [list(answer) for answer in answers]
    rows = zip(tokens, previous.logprobs, current.logprobs, strict=True)
    distance = np.concatenate([np.abs(old[ids] - new[ids]) for ids, old, new in rows]).mean()
    to_previous, to_current = (canary_gaps(answers, canary).mean() for canary in (previous, current))
    return bool(to_previous < distance / 4 and to_current > 3 * distance / 4)
