"""Policies with an adapter that does something, sequences to ask them about, and what to hold the answers against."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.policy.load import write_dequantized_base
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import Sequences, collate

CPU = torch.device("cpu")


def policy_of(model: str, quantization: str = "none", random_adapter: bool = True, **options: Any) -> Policy:
    config = PolicyConfig(model=model, quantization=quantization, lora=LoraConfig(rank=4, alpha=8), **options)
    policy = Policy(config, CPU)
    if random_adapter:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                if "lora_B" in name or "value_head" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def batch() -> Sequences:
    rng = np.random.default_rng(0)
    lengths = [(3, 5), (40, 1), (1, 12), (150, 9)]
    return collate([rng.integers(2, 96, p) for p, _ in lengths], [rng.integers(2, 96, r) for _, r in lengths], pad_id=1)


def assert_rows_close(found: torch.Tensor, expected: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    for row, values in zip(found, expected, strict=True):
        assert torch.allclose(row[: len(values)], values, atol=tolerance)
        assert (row[len(values) :] == 0).all()


def plain_base(model: str, quantization: str, folder: Path) -> str | Path:
    """What `transformers` has to load to compute what the policy's base does."""
    if quantization == "none":
        return model
    config = PolicyConfig(model=model, quantization=quantization)
    return write_dequantized_base(config, folder, CPU, torch.float32)
