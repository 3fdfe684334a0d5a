"""The Ray actor that holds a rollout engine."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from detox_ray.config import RolloutConfig
from detox_ray.errors import SyncError
from detox_ray.policy.adapter import Adapter, content_digest
from detox_ray.records import Prompt, Rollout, Sampling
from detox_ray.rollout.engine import EngineSpec, load_engine

logger = logging.getLogger(__name__)

# What is scored at a time while the rest of a call is sampled: a quarter of it, and no fewer than are worth a request.
CHUNK_SHARE, CHUNK_RESPONSES = 0.25, 32

Chunk = list[tuple[int, Rollout]]  # responses, each with its index in the call, prompt by prompt


@dataclass(frozen=True)
class Acknowledgement:
    """A worker's answer to a push: what it now serves, and the canary: likeliest next tokens of the given prefixes."""

    version: int
    digest: str
    canary: list[dict[int, float]]


def chunks(generated: Iterator[tuple[int, Rollout]], total: int) -> Iterator[Chunk]:
    """`total` responses, a chunk at a time."""
    size = max(CHUNK_RESPONSES, math.ceil(total * CHUNK_SHARE))
    while chunk := list(islice(generated, size)):
        yield chunk


@contextmanager
def ending_when_broken() -> Iterator[None]:
    """End this process when its GPU fails: no later call would succeed either, and Ray starts the worker anew."""
    try:
        yield
    except RuntimeError as error:
        if "CUDA" not in str(error):
            raise
        logger.exception("the device failed; this worker ends and is started anew")
        os._exit(1)


class RolloutWorker:
    """Samples with one engine; after a crash Ray starts it anew on the pristine base (version -1)."""

    def __init__(self, spec: EngineSpec) -> None:
        self._engine = load_engine(spec)
        self._digest = ""

    def version(self) -> int:
        """Version of the adapter served; -1 on the pristine base."""
        return self._engine.version

    @ending_when_broken()
    def apply(self, adapter: Adapter, canary_prefixes: Sequence[Sequence[int]]) -> Acknowledgement:
        """Serve `adapter` from now on and prove it.

        Raises:
            SyncError: the adapter arrived damaged, is older than what is served, or does not fit the engine's base.
        """
        digest = content_digest(adapter.peft_config, adapter.tensors)
        if digest != adapter.digest:
            raise SyncError(f"adapter version {adapter.version} arrived with digest {digest}, sent as {adapter.digest}")
        if (adapter.version, digest) == (self._engine.version, self._digest):
            # Asked again because the answer was lost; serve as before and answer anew.
            return Acknowledgement(adapter.version, digest, self._engine.next_token_logprobs(canary_prefixes))
        if adapter.version <= self._engine.version:
            raise SyncError(
                f"adapter version {adapter.version} is not newer than {self._engine.version}, which is served"
            )
        self._engine.apply(adapter)
        self._digest = digest
        return Acknowledgement(adapter.version, digest, self._engine.next_token_logprobs(canary_prefixes))

    def generate_in_chunks(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> Iterator[Chunk]:
        """`samples` responses to each prompt under the adapter served, some at a time, as soon as they are there.

        The next ones are sampled meanwhile. The same call on the same engine gives the same chunks.
        """
        with ending_when_broken():
            yield from chunks(self._engine.generate(prompts, samples, sampling), len(prompts) * samples)

    @ending_when_broken()
    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        self._engine.sleep()


def start_workers(
    spec: EngineSpec, config: RolloutConfig, places: Sequence[PlacementGroupSchedulingStrategy | str] | None = None
) -> list[Any]:
    """Start `config.workers` actors without waiting for their engines; each restarts by itself if its process dies.

    `places`: Ray's scheduling strategy of each; see `Reservation`.
    """
    environment = {
        "OMP_NUM_THREADS": str(max(1, int(config.num_cpus) // config.tensor_parallel)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    actor = ray.remote(RolloutWorker)
    return [
        actor.options(
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            resources=config.resources,
            max_restarts=-1,
            runtime_env={"env_vars": environment},
            scheduling_strategy=place,
        ).remote(spec)
        for place in places or ["DEFAULT"] * config.workers
    ]


def stop_workers(workers: Sequence[Any]) -> None:
    """Stop the actors for good."""
    for worker in workers:
        ray.kill(worker, no_restart=True)
