"""The stream over worker actors that are real but for their engine: verified pushes, staleness, killed workers."""

import os
import pickle
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import ray
from light_engine import LightPolicy, process_id, take
from light_stream import PROMPTS, LengthScorer, make_stream, publish
from ray.exceptions import RayActorError

from detox_ray.errors import SyncError
from detox_ray.policy.adapter import Adapter
from detox_ray.records import Canary, Sampling
from detox_ray.rollout.stream import RolloutStream
from detox_ray.schedule import Schedule

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def policy() -> LightPolicy:
    return LightPolicy()


@pytest.fixture
def stale_stream(workers: list[Any]) -> Iterator[RolloutStream]:
    yield from make_stream(workers, max_staleness=1)


@pytest.fixture
def stream_in_turns(workers: list[Any]) -> Iterator[RolloutStream]:
    yield from make_stream(workers, max_staleness=0, in_turns=True)


@pytest.fixture
def wide_stream(workers: list[Any]) -> Iterator[RolloutStream]:
    """80 responses of one worker and 120 of the other in a batch."""
    yield from make_stream(workers, max_staleness=0, samples=40)


def test_batches_keep_prompts_samples_and_scores_together(stream: RolloutStream, policy: LightPolicy) -> None:
    first = publish(stream, policy)
    for step in range(3):
        batch = stream.next_batch(step, last_step=9)
        expected = [p.id for p in stream.prompts_for_step(step) for _ in range(2)]
        assert [r.prompt_id for r in batch.rollouts] == expected
        assert batch.rewards.tolist() == [len(r.text) for r in batch.rollouts]
        assert {r.adapter_version for r in batch.rollouts} == {first + step}
        assert batch.staleness == 0
        assert publish(stream, policy, 0.01) == first + step + 1
    one, two = (stream.pool.sample(PROMPTS, 1, Sampling(6, seed=3)) for _ in range(2))
    assert [r.response_ids.tolist() for r in one] == [r.response_ids.tolist() for r in two]


def test_responses_are_scored_in_chunks_while_others_are_sampled(
    wide_stream: RolloutStream, policy: LightPolicy
) -> None:
    publish(wide_stream, policy)
    workers = wide_stream.pool._workers
    ray.get([worker.__ray_call__.remote(take, 2.0) for worker in workers])
    batch = wide_stream.next_batch(0, last_step=9)
    times, sizes = zip(*wide_stream.scorer.given, strict=True)
    assert sorted(sizes) == [16, 24, 32, 32, 32, 32, 32]
    assert times[-1] - times[0] > 1  # of the two seconds that sampling took
    ray.get([worker.__ray_call__.remote(take, 0.2) for worker in workers])
    assert [r.prompt_id for r in batch.rollouts] == [p.id for p in wide_stream.prompts_for_step(0) for _ in range(40)]
    assert batch.rewards.tolist() == [len(r.text) for r in batch.rollouts]


def test_a_worker_killed_between_chunks_costs_time_and_no_response(
    wide_stream: RolloutStream, policy: LightPolicy
) -> None:
    publish(wide_stream, policy)
    expected = wide_stream.next_batch(0, last_step=9)
    victim = wide_stream.pool._workers[1]
    of_victim = {prompt.text for prompt in wide_stream.prompts_for_step(0)[2:]}
    process = process_id(victim)

    class Killer(LengthScorer):
        killed = False

        def submit(self, texts: Sequence[str], prompts: Sequence[str]) -> list[str]:
            if prompts[0] in of_victim and not self.killed:
                os.kill(process, signal.SIGKILL)
                self.killed = True
            return super().submit(texts, prompts)

    ray.get(victim.__ray_call__.remote(take, 2.0))
    wide_stream.scorer = Killer()
    batch = wide_stream.next_batch(0, last_step=9)
    assert sum(size for _, size in wide_stream.scorer.given) == 200 + 32  # what came of the victim was scored twice
    assert batch.metrics["worker_restarts"] == expected.metrics["worker_restarts"] + 1
    assert [r.text for r in batch.rollouts] == [r.text for r in expected.rollouts]
    assert batch.rewards.tolist() == expected.rewards.tolist()


def test_a_stale_batch_says_so_and_is_never_older_than_allowed(
    stale_stream: RolloutStream, policy: LightPolicy
) -> None:
    publish(stale_stream, policy)
    ages = []
    for step in range(4):
        ages.append(stale_stream.next_batch(step, last_step=3).staleness)
        publish(stale_stream, policy, 0.01)
    assert ages == [0, 1, 1, 1]


def test_a_large_share_is_asked_for_in_several_calls(stream: RolloutStream, policy: LightPolicy) -> None:
    publish(stream, policy)
    stream.pool._config = stream.config.model_copy(update={"max_num_seqs": 1})
    calls = stream.pool.submit(PROMPTS, 2, Sampling(6, seed=3))
    assert [len(call.prompts) for call in calls] == [2] * 8
    assert [call.worker for call in calls] == [0] * 4 + [1] * 4
    assert len({call.sampling.seed for call in calls}) == 8
    assert {index for index, _ in stream.pool.chunks(calls)} == set(range(8))
    answered = [r.prompt_id for call in calls for r in call.rollouts()]
    assert answered == [p.id for p in PROMPTS for _ in range(2)]


def test_a_batch_ahead_is_sampled_and_scored_while_the_learner_learns(
    stale_stream: RolloutStream, policy: LightPolicy
) -> None:
    publish(stale_stream, policy)
    stale_stream.next_batch(0, last_step=3)
    ahead = stale_stream._in_flight[1]
    assert ahead.result(timeout=60).rewards.shape == (10,)
    waited = stale_stream.next_batch(1, last_step=3).metrics
    assert waited["time_acknowledge_s"] == waited["time_rollout_s"] == 0
    assert waited["time_reward_s"] < 0.1


def test_nobody_waits_for_the_slowest_worker_before_a_push(stale_stream: RolloutStream, policy: LightPolicy) -> None:
    quick, slow = stale_stream.pool._workers
    ray.get(slow.__ray_call__.remote(take, 1.5))
    first = publish(stale_stream, policy)
    stale_stream.next_batch(0, last_step=2)
    assert publish(stale_stream, policy, 0.01) == first + 1
    stale_stream.start(1, last_step=2)
    assert ray.get(quick.version.remote()) == first + 1  # behind its calls of the batches 1, before the push, and 2
    assert not stale_stream._in_flight[1].done()
    batches = [stale_stream.next_batch(step, last_step=2) for step in (1, 2)]
    ray.get(slow.__ray_call__.remote(take, 0.2))
    assert [{r.adapter_version for r in batch.rollouts} for batch in batches] == [{first}, {first + 1}]


def test_a_worker_busy_with_the_batches_before_is_not_taken_for_hung(workers: list[Any], policy: LightPolicy) -> None:
    streams = make_stream(workers, max_staleness=2)
    stream = next(streams)
    # Three batches of four calls each a worker: the last one's first answer comes after eight calls, or 1.6 s.
    stream.config = stream.pool._config = stream.config.model_copy(update={"max_num_seqs": 1, "timeout_s": 1.4})
    stream.prompts_for_step = Schedule(PROMPTS, len(PROMPTS), 0)
    publish(stream, policy)
    stream.next_batch(0, last_step=2)
    assert len(stream._in_flight[2].result(timeout=60).sampled.rollouts) == 2 * len(PROMPTS)
    assert stream.pool.restarts == 0
    next(streams, None)


def test_a_worker_killed_under_a_batch_ahead_is_brought_back_once(
    stale_stream: RolloutStream, policy: LightPolicy
) -> None:
    first = publish(stale_stream, policy)
    victim = process_id(stale_stream.pool._workers[0])
    stale_stream.next_batch(0, last_step=1)
    os.kill(victim, signal.SIGKILL)
    assert publish(stale_stream, policy, 0.01) == first + 1
    batch = stale_stream.next_batch(1, last_step=1)
    assert [r.prompt_id for r in batch.rollouts] == [p.id for p in stale_stream.prompts_for_step(1) for _ in range(2)]
    # Whoever notices first, publisher or gatherer, brings the worker back; the other finds it there.
    assert batch.metrics["worker_restarts"] <= 1


def test_discarded_batches_are_sampled_anew(stale_stream: RolloutStream, policy: LightPolicy) -> None:
    publish(stale_stream, policy)
    stale_stream.next_batch(0, last_step=9)
    assert stale_stream.discard() == stale_stream.config.max_staleness
    version = publish(stale_stream, policy, 0.01)
    batch = stale_stream.next_batch(1, last_step=9)
    assert {r.adapter_version for r in batch.rollouts} == {version}
    assert batch.staleness == 0


def test_a_killed_worker_costs_time_and_no_prompt(stream: RolloutStream, policy: LightPolicy) -> None:
    publish(stream, policy)
    version = publish(stream, policy, 0.02)
    victim = process_id(stream.pool._workers[0])
    os.kill(victim, signal.SIGKILL)
    batch = stream.next_batch(0, last_step=9)
    assert [r.prompt_id for r in batch.rollouts] == [p.id for p in stream.prompts_for_step(0) for _ in range(2)]
    assert {r.adapter_version for r in batch.rollouts} == {version}
    assert process_id(stream.pool._workers[0]) != victim
    os.kill(process_id(stream.pool._workers[1]), signal.SIGKILL)
    assert publish(stream, policy, 0.01) == version + 1
    stream.verify()
    assert [ray.get(w.version.remote()) for w in stream.pool._workers] == [version + 1] * 2


def test_a_worker_that_died_while_nobody_asked_does_not_answer_as_the_untrained_policy(
    stream: RolloutStream, policy: LightPolicy
) -> None:
    version = publish(stream, policy)
    worker = stream.pool._workers[0]
    os.kill(process_id(worker), signal.SIGKILL)
    wait_until_pristine(worker)
    batch = stream.next_batch(0, last_step=9)
    assert {r.adapter_version for r in batch.rollouts} == {version}
    assert batch.metrics["worker_restarts"] == 1


def wait_until_pristine(worker: Any, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(RayActorError):
            if ray.get(worker.version.remote()) == -1:
                return
        time.sleep(0.2)
    raise AssertionError("the worker did not come back")


def test_a_worker_whose_device_fails_is_started_anew(stream: RolloutStream, policy: LightPolicy) -> None:
    def break_down(actor: Any) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        actor._engine.generate = fail

    version = publish(stream, policy)
    worker = stream.pool._workers[1]
    before = process_id(worker)
    ray.get(worker.__ray_call__.remote(break_down))
    batch = stream.next_batch(0, last_step=9)
    assert {r.adapter_version for r in batch.rollouts} == {version}
    assert process_id(worker) != before


def test_engines_sleep_from_the_end_of_a_batch_to_the_next_push(
    stream_in_turns: RolloutStream, policy: LightPolicy
) -> None:
    def note_calls(actor: Any) -> None:
        actor.calls = []

        def noted(name: str) -> Any:
            method = getattr(actor._engine, name)
            return lambda *args: (actor.calls.append(name), method(*args))[1]

        for name in ("generate", "apply", "sleep"):
            setattr(actor._engine, name, noted(name))

    workers = stream_in_turns.pool._workers
    publish(stream_in_turns, policy)
    ray.get([worker.__ray_call__.remote(note_calls) for worker in workers])
    for step in range(2):
        stream_in_turns.next_batch(step, last_step=9)
        publish(stream_in_turns, policy, 0.01)
    for worker in workers:
        calls = ray.get(worker.__ray_call__.remote(lambda actor: actor.calls))
        assert calls == ["generate", "sleep", "apply"] * 2


def test_a_worker_lost_on_its_way_to_sleep_is_brought_back(stream_in_turns: RolloutStream, policy: LightPolicy) -> None:
    version = publish(stream_in_turns, policy)
    pool = stream_in_turns.pool
    os.kill(process_id(pool._workers[1]), signal.SIGKILL)
    pool.sleep()
    assert [ray.get(w.version.remote()) for w in pool._workers] == [version] * 2
    assert pool.restarts == 1


def test_a_worker_that_serves_something_else_stops_the_run(stream: RolloutStream, policy: LightPolicy) -> None:
    publish(stream, policy)
    canary = policy.canary()
    shifted = Canary(canary.prefixes, canary.logprobs + 0.01)
    stream.publish(policy.adapter, shifted)
    with pytest.raises(SyncError, match=r"answers the canary 0\.01"):
        stream.next_batch(0, last_step=9)

    def damaged(version: int) -> Adapter:
        adapter = policy.adapter(version)
        return Adapter(version, "0" * 64, adapter.peft_config, adapter.tensors)

    stream.connect()
    stream.publish(damaged, canary)
    with pytest.raises(SyncError, match="digest"):
        stream.verify()
    nowhere = Canary(canary.prefixes, np.full_like(canary.logprobs, np.nan))
    stream.connect()
    stream.publish(policy.adapter, nowhere)
    with pytest.raises(SyncError, match=r"(nan|inf) nats"):
        stream.verify()


def test_a_rollout_of_a_version_that_was_not_sent_is_not_trained_on(stream: RolloutStream, policy: LightPolicy) -> None:
    publish(stream, policy)
    stream.pool.version -= 1
    with pytest.raises(SyncError, match="never sent"):
        stream.next_batch(0, last_step=9)


def test_a_second_learner_continues_the_versions(stream: RolloutStream, policy: LightPolicy) -> None:
    version = publish(stream, policy)
    stream.verify()
    other = pickle.loads(pickle.dumps(stream))
    other.connect()
    assert publish(other, policy, 0.01) == version + 2  # version + 1 may have been sent


def test_what_a_killed_learner_had_sent_and_comes_late_is_refused(
    stale_stream: RolloutStream, policy: LightPolicy
) -> None:
    publish(stale_stream, policy)
    stale_stream.verify()
    late = [policy.adapter(stale_stream.pool.version + ahead) for ahead in (1, 2)]  # of a batch each
    stale_stream.connect()
    version = publish(stale_stream, policy, 0.01)
    for adapter in late:
        with pytest.raises(SyncError, match="not newer"):
            ray.get(stale_stream.pool._workers[0].apply.remote(adapter, []))
    assert {r.adapter_version for r in stale_stream.next_batch(0, last_step=0).rollouts} == {version}


def test_an_answer_that_was_lost_is_asked_for_again(stream: RolloutStream, policy: LightPolicy) -> None:
    publish(stream, policy)
    pushed = stream.pool._push
    assert pushed is not None
    worker = stream.pool._workers[0]
    again = ray.get(worker.apply.remote(pushed.adapter_ref, pushed.canary.prefixes))
    assert (again.version, again.digest) == (pushed.version, pushed.digest)
