"""Simulated rollout workers and classifiers: real Ray calls and payloads, work that is only waited for.

Many simulated workers share a process, since 256 of them do not fit on one machine: one takes 90 MB and most of a CPU
second to start, without torch, which nothing here imports. What the coordinator does is the same as for workers in
processes of their own: one Ray call a request, its answer in chunks.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from detox_ray.records import Prompt, Rollout, Sampling, Score
from detox_ray.rollout.worker import Chunk, chunks

VOCABULARY = 32_000
ANSWERED = 20  # tokens of each canary prefix that a worker answers
TEXT = "so what do you think of that, and why would anybody say it like this"


@dataclass(frozen=True)
class Times:
    """What the simulated work takes, in seconds a call."""

    generate_s: float
    apply_s: float
    score_s: float


@dataclass(frozen=True)
class SimulatedAdapter:
    """What `WorkerPool` asks of an `Adapter`, and the arrays that travel."""

    version: int
    digest: str
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True)
class SimulatedAcknowledgement:
    """What `WorkerPool` asks of an `Acknowledgement`."""

    version: int
    digest: str
    canary: list[dict[int, float]]


class WorkerHost:
    """A process with many simulated workers and classifiers; each worker does one thing at a time, in order."""

    def __init__(self, times: Times) -> None:
        self._times = times
        self._versions: dict[int, int] = {}
        self._busy: dict[int, asyncio.Lock] = {}

    async def version(self, worker: int) -> int:
        """As `RolloutWorker.version`."""
        return self._versions.get(worker, -1)

    async def apply(
        self, worker: int, adapter: SimulatedAdapter, prefixes: Sequence[Sequence[int]]
    ) -> SimulatedAcknowledgement:
        """As `RolloutWorker.apply`; the digest, which costs the real one CPU time, is part of `apply_s`."""
        async with self._lock(worker):
            await asyncio.sleep(self._times.apply_s)
            self._versions[worker] = adapter.version
        answer = {token: -float(np.log(VOCABULARY)) for token in range(ANSWERED)}
        return SimulatedAcknowledgement(adapter.version, adapter.digest, [answer] * len(prefixes))

    async def generate_in_chunks(
        self, worker: int, prompts: Sequence[Prompt], samples: int, sampling: Sampling
    ) -> AsyncIterator[Chunk]:
        """As `RolloutWorker.generate_in_chunks`: responses of the longest length, all alike, at an even pace."""
        length = sampling.max_new_tokens
        async with self._lock(worker):
            version = self._versions[worker]
            rollouts = [
                Rollout(
                    prompt.id, prompt.text, np.array(prompt.token_ids), np.arange(length),
                    np.full(length, -1.0, dtype=np.float32), TEXT, "length", version,
                )
                for prompt in prompts
                for _ in range(samples)
            ]  # fmt: skip
            for chunk in chunks(enumerate(rollouts), len(rollouts)):
                await asyncio.sleep(self._times.generate_s * len(chunk) / len(rollouts))
                yield chunk

    async def score(self, texts: Sequence[str]) -> list[Score]:
        """What the reward app would say."""
        await asyncio.sleep(self._times.score_s)
        return [Score(-1.0, {"a": -1.5, "b": -0.5}, 0.5) for _ in texts]

    def _lock(self, worker: int) -> asyncio.Lock:
        return self._busy.setdefault(worker, asyncio.Lock())


class SimulatedWorker:
    """What `WorkerPool` holds in place of an actor: `worker.apply.remote(...)` goes to the host."""

    def __init__(self, host: Any, index: int) -> None:
        self._host, self._index = host, index

    def __getattr__(self, name: str) -> "_Method":
        return _Method(getattr(self._host, name), self._index)


class _Method:
    def __init__(self, method: Any, worker: int) -> None:
        self._method, self._worker = method, worker

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._worker, *arguments)


class SimulatedClient:
    """What `RolloutScorer` asks in place of the reward app."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def submit(self, texts: Sequence[str], prompts: Sequence[str]) -> Any:
        """As `RewardClient.submit`; texts and prompts travel."""
        return self._host.score.remote(list(texts))

    def result(self, pending: Any) -> list[Score]:
        """As `RewardClient.result`."""
        return ray.get(pending)


def start_hosts(number: int, times: Times) -> list[Any]:
    """Processes for simulated workers, and one more, the last, for classifiers."""
    host: Any = ray.remote(WorkerHost).options(num_cpus=0, max_concurrency=1000)
    hosts = [host.remote(times) for _ in range(number + 1)]
    ray.get([h.version.remote(0) for h in hosts])
    return hosts


def wait(seconds: float) -> None:
    """The simulated learner's work."""
    time.sleep(seconds)
