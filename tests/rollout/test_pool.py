"""The pool of rollout workers: what does not start, the seeds of its calls, and workers that serve what was before."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from hung_process import stop_when_seen
from light_engine import DEADLY_ID, LightPolicy, engine_spec, own_group, process_id, start_light_workers, take
from ray.util.placement_group import placement_group_table

from detox_ray.config import LoraConfig, PolicyConfig, RolloutConfig
from detox_ray.errors import ModelError
from detox_ray.placement import rollout_placement
from detox_ray.policy.policy import Policy
from detox_ray.records import Canary, Prompt, Sampling
from detox_ray.reservation import reserve
from detox_ray.rollout.pool import ATTEMPTS, WorkerPool, is_stale, seed_of_call
from detox_ray.rollout.worker import start_workers, stop_workers


@pytest.fixture
def start_node(local_ray: Path) -> Iterator[Callable[[], psutil.Popen]]:
    """Starts a further node, which alone has the resource `spare`; those that are left are killed in the end."""
    nodes: list[psutil.Popen] = []

    def start() -> psutil.Popen:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus", "1"]
        command += ["--address", ray.get_runtime_context().gcs_address, "--resources", '{"spare": 1}']
        command += ["--object-store-memory", str(10**8), "--dashboard-agent-listen-port", "0"]
        nodes.append(psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return nodes[-1]

    yield start
    for node in nodes:
        kill(node)


@pytest.fixture
def light_worker(local_ray: Path) -> Iterator[tuple[Any, WorkerPool]]:
    """A worker that is asked for four responses a call, and the pool of it alone."""
    config = RolloutConfig(num_cpus=0.5, max_num_seqs=1)
    workers = start_light_workers(config)
    pool = WorkerPool(workers, config, 1e-3)
    pool.connect()
    yield workers[0], pool
    stop_workers(workers)


def kill(node: psutil.Popen) -> None:
    with suppress(psutil.NoSuchProcess):
        for process in [*node.children(recursive=True), node]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.e2e
def test_an_engine_that_cannot_start_is_one_clear_error(tmp_path: Path, local_ray: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = RolloutConfig(num_cpus=0.5)
    workers = start_workers(engine_spec(str(tmp_path)), config)
    with pytest.raises(ModelError, match="rollout worker 0 does not start: "):
        WorkerPool(workers, config, 1e-3).connect()
    stop_workers(workers)


@pytest.mark.e2e
def test_workers_are_where_room_was_reserved_for_them_and_come_back_there(local_ray: Path) -> None:
    config = RolloutConfig(workers=2, num_cpus=0.5)
    with reserve([rollout_placement(config)], print) as reservation:
        assert reservation.group is not None
        workers = start_light_workers(config, reservation.strategies(rollout_placement(config)))
        pool = WorkerPool(workers, config, 1e-3)
        pool.connect()
        os.kill(process_id(workers[1]), signal.SIGKILL)
        pool.connect()
        bundles = placement_group_table(reservation.group)["bundles_to_node_id"]
        groups = [ray.get(worker.__ray_call__.remote(own_group)) for worker in workers]
        stop_workers(workers)
    assert len(bundles) == 2
    assert groups == [reservation.group.id.hex()] * 2


@pytest.mark.e2e
def test_a_policy_is_published_to_a_real_engine(tiny_model: str, local_ray: Path) -> None:
    learned = Policy(PolicyConfig(model=tiny_model, quantization="none", lora=LoraConfig(rank=4)), torch.device("cpu"))
    config = RolloutConfig(num_cpus=0.5)
    workers = start_workers(engine_spec(tiny_model), config)
    pool = WorkerPool(workers, config, 1e-3)
    try:
        pool.connect()
        for _ in range(2):
            with torch.no_grad():
                for name, parameter in learned.trainable().items():
                    if "lora_B" in name:
                        parameter.add_(0.01)
            version = pool.publish(learned.adapter, learned.canary(150))
            rollouts = pool.sample([Prompt("0", "", (0, 10))], 2, Sampling(6, seed=3))
            assert [r.adapter_version for r in rollouts] == [version] * 2
    finally:
        stop_workers(workers)


@pytest.mark.e2e
def test_a_worker_that_hangs_while_it_starts_is_started_anew(local_ray: Path) -> None:
    config = RolloutConfig(num_cpus=0.5, start_timeout_s=10)
    stopped = stop_when_seen("ray::LightWorker")
    workers = start_light_workers(config)
    pool = WorkerPool(workers, config, 1e-3)
    pool.connect()
    assert process_id(workers[0]) != stopped.result()[0].pid
    assert ray.get(workers[0].version.remote()) == -1
    stop_workers(workers)


@pytest.mark.e2e
def test_deaths_between_finished_calls_do_not_end_a_batch(light_worker: tuple[Any, WorkerPool]) -> None:
    worker, pool = light_worker
    prompts = [Prompt(str(i), "", (0, i)) for i in range(4 * (ATTEMPTS + 3))]
    calls = pool.submit(prompts, 1, Sampling(6, seed=1))
    assert len(calls) == ATTEMPTS + 3
    for _, chunk in pool.chunks(calls):
        if chunk is not None and not all(call.is_complete for call in calls):
            ray.kill(worker, no_restart=False)
    assert pool.restarts > ATTEMPTS
    assert [r.prompt_id for call in calls for r in call.rollouts()] == [p.id for p in prompts]


@pytest.mark.e2e
def test_a_call_that_takes_its_worker_down_every_time_ends_the_batch(light_worker: tuple[Any, WorkerPool]) -> None:
    _, pool = light_worker
    prompts = [Prompt(str(i), "", (0, DEADLY_ID if i == 4 else i)) for i in range(12)]
    with pytest.raises(ModelError, match="rollout worker 0 went down 3 times"):
        pool.sample(prompts, 1, Sampling(6, seed=1))


@pytest.mark.e2e
def test_a_worker_lost_twice_on_its_way_to_sleep_is_brought_back(
    light_worker: tuple[Any, WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, pool = light_worker
    restore = pool._restore

    def restore_and_kill(*lost: Any) -> None:
        restore(*lost)
        if pool.restarts == 1:
            os.kill(process_id(worker), signal.SIGKILL)

    monkeypatch.setattr(pool, "_restore", restore_and_kill)
    os.kill(process_id(worker), signal.SIGKILL)
    pool.sleep()
    assert pool.restarts == 2
    assert ray.get(worker.version.remote()) == -1


@pytest.mark.e2e
def test_what_a_node_took_with_it_is_sampled_again(start_node: Callable[[], psutil.Popen]) -> None:
    config = RolloutConfig(num_cpus=0.5, resources={"spare": 1})
    node = start_node()
    workers = start_light_workers(config)
    pool, policy = WorkerPool(workers, config, 1e-3), LightPolicy()
    pool.connect()
    version = pool.publish(policy.adapter, policy.canary())
    ray.get(workers[0].__ray_call__.remote(take, 0.1))
    prompts = [Prompt(str(i), "long " * 40_000, (i,)) for i in range(3)]  # too large to be sent with the answer
    calls = pool.submit(prompts, 2, Sampling(6, seed=1))
    ray.get(workers[0].version.remote())  # it has answered behind them: all that was sampled lies on its node
    kill(node)
    start_node()
    rollouts = pool.rollouts(calls)
    stop_workers(workers)
    assert pool.restarts == 1
    assert [r.prompt_id for r in rollouts] == ["0", "0", "1", "1", "2", "2"]
    assert [r.adapter_version for r in rollouts] == [version] * 6


@pytest.mark.unit
def test_no_two_calls_of_neighbouring_batches_have_a_seed_in_common() -> None:
    first = 7 * 1_000_003  # of a run's steps, see `RolloutStream`
    seeds = {seed_of_call(first + step, call) for step in range(2_000) for call in range(256)}
    assert len(seeds) == 2_000 * 256
    assert min(seeds) >= 0
    assert max(seeds) < 2**31


@pytest.mark.unit
def test_a_stale_worker_shows_even_where_rounding_hides_it_from_the_tolerance() -> None:
    rng = np.random.default_rng(0)
    previous = rng.normal(-5, 1, (2, 96)).astype(np.float32)
    current = previous + rng.normal(0, 0.2, previous.shape).astype(np.float32)
    prefixes = [[1], [2]]

    def answers(logprobs: np.ndarray) -> list[dict[int, float]]:
        noisy = logprobs + rng.normal(0, 0.02, logprobs.shape)
        return [{token: float(row[token]) for token in range(20)} for row in noisy]

    old, new = Canary(prefixes, previous), Canary(prefixes, current)
    assert is_stale(answers(previous), old, new)
    assert not is_stale(answers(current), old, new)
    assert not is_stale(answers(previous), old, old)
