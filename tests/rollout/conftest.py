"""Light workers, and a stream over them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from light_engine import start_light_workers
from light_stream import make_stream

from detox_ray.config import RolloutConfig
from detox_ray.rollout.stream import RolloutStream
from detox_ray.rollout.worker import stop_workers


@pytest.fixture(scope="module")
def workers(local_ray: Path) -> Iterator[list[Any]]:
    """Two workers for all streams: each stream goes on from the version that the one before has left there."""
    workers = start_light_workers(RolloutConfig(workers=2, num_cpus=0.5))
    yield workers
    stop_workers(workers)


@pytest.fixture
def stream(workers: list[Any]) -> Iterator[RolloutStream]:
    yield from make_stream(workers, max_staleness=0)
