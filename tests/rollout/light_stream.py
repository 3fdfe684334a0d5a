"""A stream over light workers, with a reward that is easy to check."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from light_engine import LightPolicy

from detox_ray.config import RolloutConfig
from detox_ray.records import Prompt, Rollout, Score
from detox_ray.rollout.pool import WorkerPool
from detox_ray.rollout.stream import RolloutStream
from detox_ray.schedule import Schedule

PROMPTS = [Prompt(str(i), chr(40 + i), (0, 10 + i)) for i in range(16)]


class LengthScorer:
    """A reward that is easy to check: the number of characters; notes when it is given how many texts."""

    def __init__(self) -> None:
        self.given: list[tuple[float, int]] = []

    def submit(self, texts: Sequence[str], prompts: Sequence[str]) -> list[str]:
        assert len(texts) == len(prompts)
        self.given.append((time.monotonic(), len(texts)))
        return list(texts)

    def result(self, pending: list[str]) -> list[Score]:
        return [Score(float(len(text)), {"length": float(len(text))}, 0.0) for text in pending]

    def reward(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> tuple[np.ndarray, dict[str, float]]:
        return np.array([s.reward for s in scores], dtype=np.float32), {}


def make_stream(
    workers: list[Any], max_staleness: int, in_turns: bool = False, samples: int = 2
) -> Iterator[RolloutStream]:
    config = RolloutConfig(
        workers=len(workers),
        num_cpus=0.5,
        samples_per_prompt=samples,
        max_new_tokens=6,
        max_staleness=max_staleness,
        in_turns=in_turns,
    )
    pool = WorkerPool(workers, config, canary_tolerance=1e-3)
    pool.connect()
    stream = RolloutStream(pool, Schedule(PROMPTS, 5, 0), LengthScorer(), config, seed=0)
    yield stream
    for batch in stream._in_flight.values():
        batch.result()


def publish(stream: RolloutStream, policy: LightPolicy, change: float = 0.0) -> int:
    policy.change(change)
    return stream.publish(policy.adapter, policy.canary())
