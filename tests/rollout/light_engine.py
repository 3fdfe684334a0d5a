"""A rollout worker whose engine needs no torch: it starts in a second, and all else of it is the real worker."""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import ray
from ray.util.placement_group import get_current_placement_group

from detox_ray.config import RolloutConfig
from detox_ray.policy.adapter import Adapter, content_digest
from detox_ray.records import Canary, Prompt, Rollout, Sampling
from detox_ray.rollout import worker
from detox_ray.rollout.engine import EngineSpec

TOKENS = 12
END_ID = 0
DEADLY_ID = 666  # a prompt with it takes the worker's process down
generate_s = 0.2


def next_token_logprobs(weight: np.ndarray, prefix: Sequence[int]) -> np.ndarray:
    """[TOKENS] float32 of a policy whose adapter is `weight`: [TOKENS]; after other tokens another one is likely."""
    logits = np.roll(np.linspace(0, 2, TOKENS) + weight, sum(prefix))
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


class LightPolicy:
    """The learner's side: an adapter that changes, and what the policy with it answers."""

    def __init__(self) -> None:
        self._weight = np.zeros(TOKENS)

    def change(self, by: float) -> None:
        """Take a step."""
        self._weight = self._weight + by * np.arange(TOKENS)

    def adapter(self, version: int) -> Adapter:
        """See `Policy.adapter`."""
        tensors = {"weight": self._weight}
        return Adapter(version, content_digest({}, tensors), {}, tensors)

    def canary(self) -> Canary:
        """See `Policy.canary`."""
        prefixes = [[1], [2, 3]]
        return Canary(prefixes, np.stack([next_token_logprobs(self._weight, prefix) for prefix in prefixes]))


class LightEngine:
    """The worker's side."""

    def __init__(self, spec: EngineSpec) -> None:
        self.version = -1
        self._weight = np.zeros(TOKENS)

    def generate(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> Iterator[tuple[int, Rollout]]:
        """See `RolloutEngine.generate`; the last ones first, and over a moment, in which a worker can be killed."""
        rng = np.random.default_rng(sampling.seed)
        total = len(prompts) * samples
        if any(DEADLY_ID in prompt.token_ids for prompt in prompts):
            os._exit(1)
        for index in reversed(range(total)):
            time.sleep(generate_s / total)
            yield index, self._rollout(prompts[index // samples], sampling.max_new_tokens, rng)

    def _rollout(self, prompt: Prompt, most: int, rng: np.random.Generator) -> Rollout:
        ids, logprobs = list[int](), list[float]()
        while len(ids) < most and END_ID not in ids:
            row = next_token_logprobs(self._weight, [*prompt.token_ids, *ids])
            ids.append(int(np.searchsorted(np.exp(row).cumsum(), rng.random())) % TOKENS)
            logprobs.append(float(row[ids[-1]]))
        text = "".join(chr(97 + token) for token in ids if token != END_ID)
        reason = "stop" if END_ID in ids else "length"
        arrays = (np.array(prompt.token_ids), np.array(ids), np.array(logprobs, dtype=np.float32))
        return Rollout(prompt.id, prompt.text, *arrays, text, reason, self.version)

    def apply(self, adapter: Adapter) -> None:
        """See `RolloutEngine.apply`."""
        self._weight, self.version = adapter.tensors["weight"], adapter.version

    def next_token_logprobs(self, prefixes: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """See `RolloutEngine.next_token_logprobs`; of all tokens."""
        return [dict(enumerate(next_token_logprobs(self._weight, prefix).tolist())) for prefix in prefixes]

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""


class LightWorker(worker.RolloutWorker):
    """To be started in place of `RolloutWorker`."""

    def __init__(self, spec: Any) -> None:
        worker.load_engine = LightEngine  # in the actor's own process
        super().__init__(spec)


def take(actor: LightWorker, seconds: float) -> None:
    """Have a worker take so long over a call from now on; for `__ray_call__`."""
    global generate_s
    generate_s = seconds


def process_id(actor: Any) -> int:
    """Of the process that a worker runs in, once it has done what it was asked before."""
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def own_group(_: LightWorker) -> str:
    """The id of the placement group that a worker is in; for `__ray_call__`."""
    group = get_current_placement_group()
    return group.id.hex() if group else ""


def engine_spec(model: str) -> EngineSpec:
    """Of an engine of `transformers`, or of a light one, which does not look at it."""
    return EngineSpec("transformers", "adapter", model, None, "float32", 384, (0,), 1, 4, 8, 64)


def start_light_workers(config: RolloutConfig, places: Sequence[Any] | None = None) -> list[Any]:
    """As `start_workers`, with light engines."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("detox_ray.rollout.worker.RolloutWorker", LightWorker)
        return worker.start_workers(engine_spec("light"), config, places)
