"""The stream over real worker actors: verified pushes, staleness, a worker that is killed."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from detox_ray.config import LoraConfig, PolicyConfig, RolloutConfig
from detox_ray.errors import SyncError
from detox_ray.policy.adapter import Adapter
from detox_ray.policy.policy import Canary, Policy
from detox_ray.records import Prompt, Rollout, Sampling, Score
from detox_ray.rollout.engine import EngineSpec
from detox_ray.rollout.schedule import PromptSchedule
from detox_ray.rollout.stream import RolloutStream
from detox_ray.rollout.worker import start_workers, stop_workers

pytestmark = pytest.mark.e2e
PROMPTS = [Prompt(str(i), chr(40 + i), (0, 10 + i)) for i in range(16)]


class LengthScorer:
    """A reward that is easy to check: the number of characters."""

    def submit(self, texts: Sequence[str], prompts: Sequence[str]) -> list[str]:
        assert len(texts) == len(prompts)
        return list(texts)

    def result(self, response: list[str]) -> list[Score]:
        return [Score(float(len(text)), {"length": float(len(text))}, 0.0) for text in response]

    def reward(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> tuple[np.ndarray, dict[str, float]]:
        return np.array([s.reward for s in scores], dtype=np.float32), {}


@pytest.fixture(scope="module")
def policy(tiny_model: str) -> Policy:
    return Policy(PolicyConfig(model=tiny_model, quantization="none", lora=LoraConfig(rank=4)), torch.device("cpu"))


@pytest.fixture
def stream(tiny_model: str, local_ray: Path) -> Any:
    yield from make_stream(tiny_model, RolloutConfig(workers=2, num_cpus=0.5, samples_per_prompt=2, max_new_tokens=6))


@pytest.fixture
def stale_stream(tiny_model: str, local_ray: Path) -> Any:
    config = RolloutConfig(workers=2, num_cpus=0.5, samples_per_prompt=2, max_new_tokens=6, max_staleness=1)
    yield from make_stream(tiny_model, config)


def make_stream(model: str, config: RolloutConfig) -> Any:
    spec = EngineSpec("transformers", "adapter", model, None, "float32", 384, (0,), 1, 4, 8, 64)
    workers = start_workers(spec, config)
    schedule = PromptSchedule(PROMPTS, 5, 0)
    stream = RolloutStream(workers, schedule, LengthScorer(), config, seed=0, canary_tolerance=1e-3)
    stream.connect()
    yield stream
    stop_workers(workers)


def publish(stream: RolloutStream, policy: Policy, change: float = 0.0) -> int:
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.add_(change)
    return stream.publish(policy.adapter, policy.canary(150))


def test_batches_keep_prompts_samples_and_scores_together(stream: RolloutStream, policy: Policy) -> None:
    assert stream.version == -1
    assert publish(stream, policy) == 0
    for step in range(3):
        batch = stream.next_batch(step, last_step=9)
        expected = [p.id for p in stream.prompts_for_step(step) for _ in range(2)]
        assert [r.prompt_id for r in batch.rollouts] == expected
        assert batch.rewards.tolist() == [len(r.text) for r in batch.rollouts]
        assert {r.adapter_version for r in batch.rollouts} == {step}
        assert batch.staleness == 0
        assert publish(stream, policy, 0.01) == step + 1
    one, two = (stream.sample(PROMPTS, 1, Sampling(6, seed=3)) for _ in range(2))
    assert [r.response_ids.tolist() for r in one] == [r.response_ids.tolist() for r in two]


def test_a_stale_batch_says_so_and_is_never_older_than_allowed(stale_stream: RolloutStream, policy: Policy) -> None:
    publish(stale_stream, policy)
    ages = []
    for step in range(4):
        ages.append(stale_stream.next_batch(step, last_step=3).staleness)
        publish(stale_stream, policy, 0.01)
    assert ages == [0, 1, 1, 1]


def test_a_killed_worker_costs_time_and_no_prompt(stream: RolloutStream, policy: Policy) -> None:
    publish(stream, policy)
    publish(stream, policy, 0.02)
    victim = ray.get(stream.workers[0].process_id.remote())
    os.kill(victim, signal.SIGKILL)
    batch = stream.next_batch(0, last_step=9)
    assert [r.prompt_id for r in batch.rollouts] == [p.id for p in stream.prompts_for_step(0) for _ in range(2)]
    assert {r.adapter_version for r in batch.rollouts} == {1}
    assert ray.get(stream.workers[0].process_id.remote()) != victim
    os.kill(ray.get(stream.workers[1].process_id.remote()), signal.SIGKILL)
    assert publish(stream, policy, 0.01) == 2
    assert [ray.get(w.version.remote()) for w in stream.workers] == [2, 2]


def test_a_worker_that_serves_something_else_stops_the_run(stream: RolloutStream, policy: Policy) -> None:
    publish(stream, policy)
    canary = policy.canary(150)
    shifted = Canary(canary.prefixes, canary.logprobs + 0.01)
    with pytest.raises(SyncError, match=r"answers the canary 0\.01"):
        stream.publish(policy.adapter, shifted)

    def damaged(version: int) -> Adapter:
        adapter = policy.adapter(version)
        return Adapter(version, "0" * 64, adapter.peft_config, adapter.tensors)

    with pytest.raises(SyncError, match="digest"):
        stream.publish(damaged, canary)
    nowhere = Canary(canary.prefixes, np.full_like(canary.logprobs, np.nan))
    stream.connect()
    with pytest.raises(SyncError, match="inf nats"):
        stream.publish(policy.adapter, nowhere)


def test_a_rollout_of_an_unacknowledged_version_is_not_trained_on(stream: RolloutStream, policy: Policy) -> None:
    with pytest.raises(SyncError, match="never acknowledged"):
        stream.next_batch(0, last_step=9)


def test_a_second_learner_continues_the_versions(stream: RolloutStream, policy: Policy) -> None:
    publish(stream, policy)
    publish(stream, policy)
    other = RolloutStream(
        stream.workers, stream.prompts_for_step, stream.scorer, stream.config, seed=0, canary_tolerance=1e-3
    )
    other.connect()
    assert publish(other, policy) == 2
