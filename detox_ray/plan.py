"""A run that is known to fit together, before anything expensive starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from uuid import uuid4

import torch

from detox_ray.cluster import check_cluster_answers, local_capacity, starts_own_ray
from detox_ray.config import Config, PolicyConfig, RolloutConfig
from detox_ray.data.learned import is_known, learned_by, write_learned
from detox_ray.data.prompts import PromptSplit, load_prompts
from detox_ray.errors import ConfigError
from detox_ray.placement import check_placements, placements
from detox_ray.policy.compilation import check_compiler
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
from detox_ray.run_folder import RunFolder, check_usable
from detox_ray.terminal import Terminal, with_lab
from detox_ray.tracking.tracker import check_tracking


@dataclass(frozen=True)
class Plan:
    """A run whose parts are known to fit together, before anything expensive has started."""

    config: Config
    run: RunFolder
    prompts: PromptSplit
    engine: EngineSpec
    learner_device: torch.device
    app_name: str = field(default_factory=lambda: f"reward-{uuid4().hex[:8]}")

    @property
    def canary_length(self) -> int:
        """Longest canary sequence, in tokens."""
        return min(CANARY_LENGTH, self.engine.max_length - 1)


@contextmanager
def prepare(config: Config, terminal: Terminal) -> Iterator[Plan]:
    """Check what can be refused before it costs, read the prompts, open the run folder for the block.

    Raises:
        ConfigError, DataError, ModelError: something does not fit.
    """
    check_usable(config.run_dir)
    if starts_own_ray(config.ray):
        check_placements(placements(config), local_capacity(config.ray))
        if config.train.compile:
            check_compiler()
    given = config.with_absolute_paths()
    config = with_lab(given, terminal)
    check_tracking(config.tracking)
    for classifier in [*config.reward.classifiers, config.evaluation.judge]:
        check_classifier(classifier)
    for extra in config.reward.shaping.extra:
        load_term(extra)
    device = torch.device("cuda" if config.train.num_gpus > 0 else "cpu")
    engine, reason = plan_engine(config.policy, config.rollout, config.data.max_tokens, device)
    check_adapter(config.policy)
    adapter, tokenizer = config.policy.adapter, load_tokenizer(config.policy)
    learned = learned_by(adapter)
    prompts = load_prompts(config.data, tokenizer, config.seed, learned)

    with RunFolder.open(given) as run:
        if adapter is not None and run.has_results:
            # The run's own training prompts are among what it noted as learned when it began. Of all prompts this
            # leaves exactly those it held out then, also where the adapter's own folder has changed or is gone.
            learned = learned_by(adapter, str(run.adapter))
            prompts = load_prompts(config.data, tokenizer, config.seed, learned)
        write_learned(run.path, prompts.learned, learned)
        check_cluster_answers(config.ray)
        terminal.stage(f"run folder {run.path}")
        terminal.stage(f"{len(prompts.train)} training and {len(prompts.heldout)} held-out prompts{_skipped(prompts)}")
        terminal.stage(reason)
        if adapter is not None and not is_known(adapter):
            terminal.stage(
                f"caution: {adapter} lies in no run folder; what it was trained on may be among the held-out"
            )
        yield Plan(config, run, prompts, engine, device)


def canary_tolerance(policy: PolicyConfig, rollout: RolloutConfig, engine: EngineSpec) -> float:
    """Largest difference between a worker's and the learner's log-probabilities after a push, in nats."""
    if rollout.canary_tolerance is not None:
        return rollout.canary_tolerance
    if policy.quantization != "none" and rollout.base != "dequantized":
        return 1.0
    return 1e-3 if engine.dtype == "float32" else 0.5


def plan_engine(
    policy: PolicyConfig, rollout: RolloutConfig, max_prompt_tokens: int, learner_device: torch.device
) -> tuple[EngineSpec, str]:
    """What the engines start from, and a line that says which they are and why.

    Raises:
        ConfigError: prompt and response together are longer than the model can read, or engine, sync, base and
            architecture do not go together.
        ModelError: the model or its tokenizer cannot be read.
    """
    model_config = load_model_config(policy)
    kind, sync, reason = choose_engine(rollout, (model_config.architectures or ["unknown"])[0])
    tokenizer = load_tokenizer(policy)
    needed = max_prompt_tokens + 1 + rollout.max_new_tokens
    limit = getattr(model_config, "max_position_embeddings", needed)
    if needed > limit:
        raise ConfigError(
            f"data.max_tokens={max_prompt_tokens} + rollout.max_new_tokens={rollout.max_new_tokens} + 1 exceeds "
            f"the {limit} positions of {policy.model}; lower one of them"
        )
    heads = getattr(model_config, "num_attention_heads", 1)
    if heads % rollout.tensor_parallel:
        raise ConfigError(
            f"rollout.tensor_parallel={rollout.tensor_parallel} does not divide the {heads} attention heads of "
            f"{policy.model}; choose a number that does"
        )
    spec = EngineSpec(
        kind=kind,
        sync=sync,
        model=policy.model,
        revision=policy.revision,
        dtype=str(compute_dtype(policy, learner_device)).removeprefix("torch."),
        max_length=min(limit, max(needed, CANARY_LENGTH + 1)),
        end_ids=end_token_ids(policy, tokenizer),
        pad_id=int(tokenizer.pad_token_id),
        lora_rank=policy.lora.rank,
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_mib=rollout.kv_cache_mib,
        device="cuda" if rollout.num_gpus > 0 else "cpu",
        tensor_parallel=rollout.tensor_parallel,
        in_turns=rollout.in_turns,
    )
    return spec, f"rollout engine: {kind}, adapters {'merged' if sync == 'merged' else 'as LoRA'} ({reason})"


def with_dequantized_base(
    spec: EngineSpec, policy: PolicyConfig, rollout: RolloutConfig, folder: RunFolder, learner_device: torch.device
) -> EngineSpec:
    """The engine on the dequantised base, which is written into `folder`, where the configuration wants one."""
    if rollout.base != "dequantized" or policy.quantization == "none":
        return spec
    device = learner_device if torch.cuda.is_available() else torch.device("cpu")
    base = write_dequantized_base(
        policy, folder.dequantized_base(policy, spec.dtype), device, getattr(torch, spec.dtype)
    )
    return replace(spec, model=str(base), revision=None)


def _skipped(prompts: PromptSplit) -> str:
    """ ", 12 too short, 3 duplicates left out", or nothing."""
    parts = [f"{count} {reason}" for reason, count in prompts.skipped.items() if count]
    return f" (left out: {', '.join(parts)})" if parts else ""
