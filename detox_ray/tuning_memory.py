"""`detox-ray plan` for a fine-tuning: there are only learners."""

import torch

from detox_ray.memory_plan import MemoryPlan, learner_role, weight_remedies, worthwhile
from detox_ray.policy.footprint import Skeleton, activation_bytes, load_skeleton, logits_bytes
from detox_ray.policy.load import compute_dtype
from detox_ray.sft_config import SFTConfig


def plan_tuning_memory(config: SFTConfig) -> MemoryPlan:
    """What the run needs when its examples are as long as `data.max_tokens` allows; the model is a folder or a hub id.

    Raises:
        ModelError: the model's configuration cannot be read.
    """
    policy, train = config.policy, config.train
    device = torch.device("cuda" if train.num_gpus > 0 else "cpu")
    shape = load_skeleton(policy, compute_dtype(policy, device))
    now = _pass_bytes(config, shape, policy.gradient_checkpointing, train.microbatch_tokens)
    remedies = weight_remedies(policy, train, shape)
    if not policy.gradient_checkpointing:
        checkpointed = _pass_bytes(config, shape, True, train.microbatch_tokens)
        remedies["policy.gradient_checkpointing=true"] = now - checkpointed
    halved = max(1, train.microbatch_tokens // 2)
    smaller = _pass_bytes(config, shape, policy.gradient_checkpointing, halved)
    remedies[f"train.microbatch_tokens={halved}"] = now - smaller
    note = f"{shape.base_parameters():,} parameters, {shape.adapter_parameters():,} trained"
    return MemoryPlan([learner_role(policy, train, train, shape, now)], worthwhile(remedies), note)


def _pass_bytes(config: SFTConfig, shape: Skeleton, checkpointing: bool, microbatch_tokens: int) -> float:
    """What the largest pass keeps: as many of the longest examples as it holds, or one of them."""
    longest = config.data.max_tokens
    sequences = max(1, min(config.train.batch_size, microbatch_tokens // longest))
    prompt = longest // 2
    kept = activation_bytes(shape, sequences, prompt, longest - prompt, checkpointing)
    return kept + logits_bytes(shape, sequences * longest)
