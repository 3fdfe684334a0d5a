"""A run that is known to fit together, before anything expensive starts."""

from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from detox_ray.cluster import check_resources, cluster_address, local_resources
from detox_ray.config import Config
from detox_ray.data.lab import lab_folder, resolve_lab, uses_lab
from detox_ray.data.prompts import PromptSplit, load_prompts
from detox_ray.errors import ConfigError
from detox_ray.evaluation.perplexity import load_reference_model
from detox_ray.policy.load import (
    compute_dtype,
    end_token_ids,
    load_model_config,
    load_tokenizer,
    write_dequantized_base,
)
from detox_ray.policy.policy import CANARY_LENGTH, check_adapter
from detox_ray.rewards.classifiers import check_classifier
from detox_ray.rewards.shaping import load_term
from detox_ray.rollout.engine import EngineSpec, choose_engine
from detox_ray.run_folder import RunFolder
from detox_ray.terminal import Terminal


@dataclass(frozen=True)
class Plan:
    """A run whose parts are known to fit together, before anything expensive has started."""

    config: Config
    run: RunFolder
    prompts: PromptSplit
    engine: EngineSpec
    app_name: str = field(default_factory=lambda: f"reward-{uuid4().hex[:8]}")

    @property
    def canary_length(self) -> int:
        """Longest canary sequence, in tokens."""
        return min(CANARY_LENGTH, self.engine.max_length - 1)

    def load_model(self, path: str, revision: str | None) -> Any:
        """A model for the driver's own checks, in the engines' precision, on a GPU where the run uses one."""
        device = "cuda" if self.config.train.num_gpus > 0 and torch.cuda.is_available() else "cpu"
        return load_reference_model(path, revision, device, getattr(torch, self.engine.dtype))

    @property
    def canary_tolerance(self) -> float:
        """Largest difference between a worker's and the learner's log-probabilities after a push, in nats."""
        if self.config.rollout.canary_tolerance is not None:
            return self.config.rollout.canary_tolerance
        if self.config.policy.quantization != "none" and self.config.rollout.base != "dequantized":
            return 1.0
        return 1e-3 if self.engine.dtype == "float32" else 0.5


def prepare(config: Config, terminal: Terminal) -> Plan:
    """Check what can be refused before it costs, read the prompts, open the run folder, write the engine's base.

    Raises:
        ConfigError, DataError, ModelError: something does not fit.
    """
    if cluster_address(config) is None:
        check_resources(config, local_resources(config))
    given = config.with_absolute_paths()
    config = _with_lab(given, terminal)
    for classifier in [*config.reward.classifiers, config.evaluation.judge]:
        check_classifier(classifier)
    for extra in config.reward.shaping.extra:
        load_term(extra)
    model_config = load_model_config(config.policy)
    kind, sync, reason = choose_engine(config.rollout, (model_config.architectures or ["unknown"])[0])
    tokenizer = load_tokenizer(config.policy)
    check_adapter(config.policy)
    prompts = load_prompts(config.data, tokenizer, config.seed)
    learner_device = torch.device("cuda" if config.train.num_gpus > 0 else "cpu")
    dtype = compute_dtype(config.policy, learner_device)
    engine = _engine_spec(config, kind, sync, dtype, tokenizer, model_config)

    run = RunFolder.open(given)
    terminal.stage(f"run folder {run.path}")
    terminal.stage(f"{len(prompts.train)} training and {len(prompts.heldout)} held-out prompts{_skipped(prompts)}")
    terminal.stage(f"rollout engine: {kind}, adapters {'merged' if sync == 'merged' else 'as LoRA'} ({reason})")
    if config.rollout.base == "dequantized" and config.policy.quantization != "none":
        device = learner_device if torch.cuda.is_available() else torch.device("cpu")
        base = write_dequantized_base(config.policy, run.dequantized_base, device, dtype)
        engine = replace(engine, model=str(base), revision=None)
    return Plan(config, run, prompts, engine)


def _with_lab(config: Config, terminal: Terminal) -> Config:
    if not uses_lab(config) or lab_folder().is_dir():
        return resolve_lab(config)
    with terminal.bar("building the offline lab", total=1) as progress:
        return resolve_lab(config, lambda _, share: progress(share))


def _engine_spec(
    config: Config, kind: Any, sync: Any, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, model_config: Any
) -> EngineSpec:
    """What the engines start from.

    Raises:
        ConfigError: prompt and response together are longer than the model can read.
    """
    rollout = config.rollout
    needed = config.data.max_tokens + 1 + rollout.max_new_tokens
    limit = getattr(model_config, "max_position_embeddings", needed)
    if needed > limit:
        raise ConfigError(
            f"data.max_tokens={config.data.max_tokens} + rollout.max_new_tokens={rollout.max_new_tokens} + 1 exceeds "
            f"the {limit} positions of {config.policy.model}; lower one of them"
        )
    return EngineSpec(
        kind=kind,
        sync=sync,
        model=config.policy.model,
        revision=config.policy.revision,
        dtype=str(dtype).removeprefix("torch."),
        max_length=min(limit, max(needed, CANARY_LENGTH + 1)),
        end_ids=end_token_ids(config.policy, tokenizer),
        pad_id=int(tokenizer.pad_token_id),
        lora_rank=config.policy.lora.rank,
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_mib=rollout.kv_cache_mib,
        device="cuda" if rollout.num_gpus > 0 else "cpu",
        bitsandbytes=rollout.base == "bitsandbytes",
    )


def _skipped(prompts: PromptSplit) -> str:
    """ ", 12 too short, 3 duplicates left out", or nothing."""
    parts = [f"{count} {reason}" for reason, count in prompts.skipped.items() if count]
    return f" (left out: {', '.join(parts)})" if parts else ""
