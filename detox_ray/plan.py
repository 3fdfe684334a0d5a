"""A run that is known to fit together, before anything expensive starts."""

from dataclasses import dataclass
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from detox_ray.cluster import check_resources, cluster_address, local_resources
from detox_ray.config import Config
from detox_ray.data.lab import resolve_lab
from detox_ray.data.prompts import PromptSplit, load_prompts
from detox_ray.errors import ConfigError
from detox_ray.policy.load import end_token_ids, load_model_config, load_tokenizer, write_dequantized_base
from detox_ray.policy.policy import CANARY_LENGTH, check_adapter
from detox_ray.rewards.classifiers import check_classifier
from detox_ray.rollout.engine import EngineSpec, choose_engine
from detox_ray.run_folder import RunFolder
from detox_ray.terminal import Terminal


@dataclass(frozen=True)
class Plan:
    """A run whose parts are known to fit together, before anything expensive has started."""

    config: Config
    run: RunFolder
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSplit
    engine: EngineSpec

    @property
    def app_name(self) -> str:
        """Name of the run's reward app on Serve."""
        return f"reward-{self.config.name}"

    @property
    def canary_length(self) -> int:
        """Longest canary sequence, in tokens."""
        return min(CANARY_LENGTH, self.engine.max_length - 1)

    @property
    def canary_tolerance(self) -> float:
        """Largest difference between a worker's and the learner's log-probabilities after a push, in nats."""
        return self.config.rollout.canary_tolerance or (1e-3 if self.engine.dtype == "float32" else 0.5)


def prepare(config: Config, terminal: Terminal) -> Plan:
    """Check what can be refused before it costs, read the prompts, open the run folder, write the engine's base.

    Raises:
        ConfigError, DataError, ModelError: something does not fit.
    """
    given = config
    if cluster_address(config) is None:
        check_resources(config, local_resources(config))
    with terminal.bar("building the offline lab", total=1) as progress:
        config = resolve_lab(config, lambda _, share: progress(share)).with_absolute_paths()
    for classifier in [*config.reward.classifiers, config.evaluation.judge]:
        check_classifier(classifier)
    model_config = load_model_config(config.policy)
    kind, sync, reason = choose_engine(config.rollout, model_config.architectures[0])
    tokenizer = load_tokenizer(config.policy)
    check_adapter(config.policy)
    prompts = load_prompts(config.data, tokenizer, config.seed)
    run = RunFolder.open(given)
    terminal.stage(f"run folder {run.path}")
    terminal.stage(f"{len(prompts.train)} training and {len(prompts.heldout)} held-out prompts{_skipped(prompts)}")
    model = config.policy.model
    if config.rollout.base == "dequantized" and config.policy.quantization != "none":
        model = str(write_dequantized_base(config.policy, run.dequantized_base))
    terminal.stage(f"rollout engine: {kind}, adapters {'merged' if sync == 'merged' else 'as LoRA'} ({reason})")
    engine = _engine_spec(config, model, kind, sync, tokenizer, model_config)
    return Plan(config, run, tokenizer, prompts, engine)


def _engine_spec(
    config: Config, model: str, kind: Any, sync: Any, tokenizer: PreTrainedTokenizerBase, model_config: Any
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
    dtype = config.policy.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if rollout.num_gpus > 0 else "float32"
    return EngineSpec(
        kind=kind,
        sync=sync,
        model=model,
        revision=config.policy.revision if model == config.policy.model else None,
        dtype=dtype,
        max_length=min(limit, max(needed, CANARY_LENGTH + 1)),
        end_ids=end_token_ids(config.policy, tokenizer),
        pad_id=int(tokenizer.pad_token_id),
        lora_rank=config.policy.lora.rank,
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_mib=rollout.kv_cache_mib,
        bitsandbytes=rollout.base == "bitsandbytes",
    )


def _skipped(prompts: PromptSplit) -> str:
    """ ", 12 too short, 3 duplicates left out", or nothing."""
    parts = [f"{count} {reason}" for reason, count in prompts.skipped.items() if count]
    return f" (left out: {', '.join(parts)})" if parts else ""
