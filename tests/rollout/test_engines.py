"""The engines, in worker actors, against plain `peft` on the same base: before and after pushes, past a cache block."""

import gc
import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from families import FAMILIES, save_family
from peft import PeftModel
from transformers import AutoModelForCausalLM

from detox_ray.config import LoraConfig, PolicyConfig, RolloutConfig
from detox_ray.errors import SyncError
from detox_ray.plan import plan_engine, with_dequantized_base
from detox_ray.policy.adapter import Adapter, save_adapter
from detox_ray.policy.load import write_dequantized_base
from detox_ray.policy.policy import Policy, canary_of
from detox_ray.records import Canary, Prompt, Rollout, Sampling
from detox_ray.rollout.engine import EngineSpec, in_order
from detox_ray.rollout.pool import canary_gaps
from detox_ray.rollout.worker import RolloutWorker, start_workers, stop_workers
from detox_ray.run_folder import RunFolder

pytestmark = pytest.mark.e2e
TOLERANCE = 1e-4
PUSHES = 3
ENGINES = [
    ("vllm", "merged", 1),
    ("vllm", "adapter", 1),
    ("vllm", "merged", 2),
    ("vllm", "adapter", 2),
    ("transformers", "adapter", 1),
]


@pytest.fixture(scope="module")
def policy(tiny_model: str) -> Policy:
    return Policy(PolicyConfig(model=tiny_model, lora=LoraConfig(rank=4)), torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("engines") / "base"
    return str(write_dequantized_base(PolicyConfig(model=tiny_model), folder, torch.device("cpu"), torch.float32))


@pytest.fixture(scope="module")
def actors(local_ray: Path) -> Iterator[list[Any]]:
    """The worker of the first engine, in which the others start after it: importing vLLM takes longer than that."""
    started: list[Any] = []
    yield started
    stop_workers(started)


@pytest.fixture(scope="module", params=ENGINES, ids=lambda p: "-".join(map(str, p)))
def worker(request: pytest.FixtureRequest, base: str, actors: list[Any]) -> Any:
    kind, sync, parts = request.param
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    spec = EngineSpec(kind, sync, base, None, "float32", 384, (0,), 1, 4, 8, 64, tensor_parallel=parts)

    def start_anew(actor: Any) -> None:
        actor._engine = None
        gc.collect()  # an engine takes the process's groups with it, so it must be gone before the next one comes
        RolloutWorker.__init__(actor, spec)

    if actors:
        ray.get(actors[0].__ray_call__.remote(start_anew))
    else:
        actors += start_workers(spec, RolloutConfig(num_cpus=0.5, tensor_parallel=parts))
    return actors[0]


def random_adapter(policy: Policy, version: int) -> Adapter:
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy.adapter(version)


def prompts() -> list[Prompt]:
    """The same short and long ones after every push; the long ones share whole cache blocks."""
    rng = np.random.default_rng(0)
    shared = rng.integers(2, 96, 300).tolist()
    return [Prompt(str(n), "", (0, *shared[:n])) for n in (3, 40, 140, 260, 300)]


def largest_difference(rollouts: list[Rollout], model: Any, suppressed: tuple[int, ...] = ()) -> float:
    worst = 0.0
    for rollout in rollouts:
        ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.response_ids]))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, len(rollout.prompt_ids) - 1 : -1]
        logits[:, list(suppressed)] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, ids[len(rollout.prompt_ids) :, None])[:, 0]
        worst = max(worst, float((expected - torch.from_numpy(rollout.logprobs)).abs().max()))
    return worst


def responses(worker: Any, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> list[Rollout]:
    """All that the worker generates, prompt by prompt."""
    chunks = worker.generate_in_chunks.remote(prompts, samples, sampling)
    return in_order(response for chunk in chunks for response in ray.get(chunk))


def test_logprobs_are_those_of_peft_before_and_after_every_push(
    worker: Any, policy: Policy, base: str, tmp_path: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    sampling = Sampling(max_new_tokens=12, seed=5)
    rollouts = responses(worker, prompts(), 2, sampling)
    assert {r.adapter_version for r in rollouts} == {-1}
    assert largest_difference(rollouts, model) <= TOLERANCE
    for version in range(PUSHES):
        adapter = random_adapter(policy, version)
        save_adapter(adapter, tmp_path / "adapter")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
        canary = canary_of(model, 150)
        acknowledged = ray.get(worker.apply.remote(ray.put(adapter), canary.prefixes))
        assert (acknowledged.version, acknowledged.digest) == (version, adapter.digest)
        assert canary_gaps(acknowledged.canary, canary).max() <= TOLERANCE
        rollouts = responses(worker, prompts(), 2, sampling)
        assert {r.adapter_version for r in rollouts} == {version}
        assert largest_difference(rollouts, model) <= TOLERANCE
        # The adapter of the version before is far away: the check above can fail.
        assert largest_difference(rollouts, AutoModelForCausalLM.from_pretrained(base)) > 0.05
    if adapter_folder := ray.get(worker.__ray_call__.remote(folder_of_adapter)):
        assert not Path(adapter_folder).parent.exists()  # what a killed engine would leave behind
    with pytest.raises(SyncError, match="not newer"):
        ray.get(worker.apply.remote(replace(adapter, version=0), canary.prefixes))
    damaged = Adapter(PUSHES, adapter.digest, adapter.peft_config, {**adapter.tensors})
    name = next(iter(damaged.tensors))
    damaged.tensors[name] = damaged.tensors[name] + 1
    with pytest.raises(SyncError, match="arrived with digest"):
        ray.get(worker.apply.remote(damaged, canary.prefixes))
    ended(worker, model)
    fixed(worker, model)


def folder_of_adapter(actor: Any) -> str:
    """What vLLM read the adapter from, if it serves it in a LoRA slot."""
    lora = getattr(actor._engine, "_lora", None)
    return lora.lora_path if lora else ""


def test_an_engine_that_slept_answers_as_before(worker: Any) -> None:
    asked = (prompts(), 2, Sampling(max_new_tokens=12, seed=5))
    before = responses(worker, *asked)
    ray.get([worker.sleep.remote(), worker.sleep.remote()])
    if "vllm" in ray.get(worker.__ray_call__.remote(lambda actor: type(actor._engine).__module__)):
        assert ray.get(worker.__ray_call__.remote(lambda actor: actor._engine._llm.llm_engine.is_sleeping()))
    for old, new in zip(before, responses(worker, *asked), strict=True):
        assert new.response_ids.tolist() == old.response_ids.tolist()
        assert np.abs(new.logprobs - old.logprobs).max() <= TOLERANCE


def ended(worker: Any, model: Any) -> None:
    rollouts = responses(worker, prompts()[:2], 64, Sampling(max_new_tokens=32, seed=1))
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    assert stopped
    assert all(r.response_ids[-1] == 0 and 0 not in r.response_ids[:-1] for r in stopped)
    assert all(len(r.response_ids) == 32 and 0 not in r.response_ids for r in rollouts if r.finish_reason == "length")
    assert all(len(r.text) == len(r.response_ids[r.response_ids > 1]) for r in rollouts if 2 not in r.response_ids)


def fixed(worker: Any, model: Any) -> None:
    """A masked end token: every response is whole, and its log-probabilities are those of the masked distribution."""
    sampling = Sampling(max_new_tokens=20, fixed_length=True, temperature=0.8, seed=2)
    rollouts = responses(worker, prompts()[:2], 16, sampling)
    assert all(len(r.response_ids) == 20 and 0 not in r.response_ids for r in rollouts)

    class Warm(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            output = model(input_ids=input_ids)
            output.logits = output.logits / 0.8
            return output

    assert largest_difference(rollouts, Warm(), suppressed=(0,)) <= TOLERANCE


def test_a_push_to_vllm_is_exact_in_every_family_it_serves(tmp_path: Path) -> None:
    """Llama is pushed to above, and Qwen2 differs from Qwen3 by less than either from the others."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    tasks, expected = {}, {}
    for family in FAMILIES.keys() - {"GPTNeo", "Llama", "Qwen2"}:
        tasks[family], expected[family] = push_of(family, tmp_path)
    file = tmp_path / "tasks"
    file.write_bytes(pickle.dumps(list(tasks.values())))
    script = Path(__file__).with_name("push_in_turn.py")
    done = subprocess.run([sys.executable, str(script), str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for family, (before, after) in zip(tasks, pickle.loads(file.read_bytes()), strict=True):
        base, tuned = expected[family]
        assert canary_gaps(before, base).max() <= TOLERANCE, family
        assert canary_gaps(after, tuned).max() <= TOLERANCE, family
        assert canary_gaps(before, tuned).max() > 0.05, family


def push_of(family: str, folder: Path) -> tuple[tuple[EngineSpec, Adapter, list[list[int]]], tuple[Canary, Canary]]:
    """What an engine is asked on the family's NF4 base, and the learner's canary before and after."""
    config = PolicyConfig(model=save_family(family, folder / family), lora=LoraConfig(rank=4))
    rollout = RolloutConfig(kv_cache_mib=16)
    spec, line = plan_engine(config, rollout, 60, torch.device("cpu"))
    assert line.startswith("rollout engine: vllm, adapters merged (vLLM serves ")
    spec = with_dequantized_base(spec, config, rollout, RunFolder(folder), torch.device("cpu"))
    policy = Policy(config, torch.device("cpu"))
    base = policy.canary(150)
    adapter = random_adapter(policy, 0)
    return (spec, adapter, base.prefixes), (base, policy.canary(150))
