"""Evaluations during training, over worker actors that are real but for their engine."""

import os
import signal
from concurrent.futures import Future
from typing import Any

import pytest
from light_engine import LightPolicy, process_id
from light_stream import PROMPTS, make_stream, publish

from detox_ray.records import Rollout, Sampling
from detox_ray.rollout.stream import RolloutStream

pytestmark = pytest.mark.e2e


@pytest.fixture
def policy() -> LightPolicy:
    return LightPolicy()


class Notes:
    """An evaluation that keeps what it is given."""

    def __init__(self) -> None:
        self.prompts = PROMPTS
        self.sampling = Sampling(6, seed=9)
        self.given: list[tuple[Future[list[Rollout]], int]] = []

    def judge(self, rollouts: Future[list[Rollout]], version: int, step: int, reward: float) -> None:
        self.given.append((rollouts, version))

    def finished(self, until: int) -> list[dict[str, float]]:
        return []


def test_a_worker_killed_under_an_evaluation_is_asked_again(stream: RolloutStream, policy: LightPolicy) -> None:
    stream.evaluation = notes = Notes()
    sent = publish(stream, policy)
    stream.verify()
    process = process_id(stream.pool._workers[0])
    stream.evaluate(0, 0.5)
    os.kill(process, signal.SIGKILL)
    stream.start(0, last_step=0)
    [(rollouts, version)] = notes.given
    assert [r.prompt_id for r in rollouts.result(timeout=60)] == [p.id for p in PROMPTS]
    assert {r.adapter_version for r in rollouts.result()} == {version} == {sent}
    assert len(stream.next_batch(0, last_step=0).rollouts) == 10


def test_a_batch_behind_a_long_evaluation_is_not_taken_for_silence(workers: list[Any], policy: LightPolicy) -> None:
    streams = make_stream(workers, max_staleness=0)
    stream = next(streams)
    # The evaluation is of eight calls a worker, 0.2 s each.
    stream.config = stream.pool._config = stream.config.model_copy(update={"max_num_seqs": 1, "timeout_s": 1.4})
    stream.evaluation = notes = Notes()
    notes.prompts = PROMPTS * 4
    publish(stream, policy)
    stream.evaluate(0, 0.5)
    assert len(stream.next_batch(1, last_step=1).rollouts) == 10
    assert stream.pool.restarts == 0
    next(streams, None)
