"""The optimiser of an adapter, and its learning rate by step: of PPO and of fine-tuning alike."""

from typing import Any

import torch

from detox_ray.ppo_config import OptimizerConfig


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit or paged form of it; each group has its own `params` and `lr`."""
    options: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    import bitsandbytes

    kinds = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return kinds[config.optimizer](groups, **options)


def schedule_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """What the learning rates are multiplied by at a step: warm-up, then the schedule."""
    factor = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return factor * (1 - step / total_steps) if config.schedule == "linear" else factor
