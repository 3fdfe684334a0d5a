"""The pool of rollout workers: what does not start, the seeds of its calls, and workers that serve what was before."""

from pathlib import Path

import numpy as np
import pytest
from light_engine import engine_spec

from detox_ray.config import RolloutConfig
from detox_ray.errors import ModelError
from detox_ray.records import Canary
from detox_ray.rollout.pool import WorkerPool, is_stale, seed_of_call
from detox_ray.rollout.worker import start_workers, stop_workers


@pytest.mark.e2e
def test_an_engine_that_cannot_start_is_one_clear_error(tmp_path: Path, local_ray: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = RolloutConfig(num_cpus=0.5)
    workers = start_workers(engine_spec(str(tmp_path)), config)
    with pytest.raises(ModelError, match="rollout worker 0 does not start: "):
        WorkerPool(workers, config, 1e-3).connect()
    stop_workers(workers)


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
