"""Merge a LoRA adapter into pristine base weights: W + scale * B A (Hu et al. 2021, eq. 3)."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from detox_ray.errors import ModelError, SyncError
from detox_ray.hub import why_not_loaded
from detox_ray.policy.adapter import Adapter

PEFT_PREFIX = "base_model.model."


def load_pristine_weights(model: str, revision: str | None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint (folder or hub id), on the CPU, by its name in the file.

    Raises:
        ModelError: the hub does not give them.
        SyncError: there is no safetensors file.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError) as error:
            raise ModelError(f"{model}: its weights cannot be loaded: {why_not_loaded(model, error)}") from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SyncError(f"rollout.sync=merged: {model} has no safetensors file; use rollout.sync=adapter")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def merged_weights(pristine: dict[str, Tensor], adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint with the adapter merged in, tensor by tensor; `pristine` is left as it is, so nothing drifts.

    Raises:
        SyncError: the adapter changes a weight that the checkpoint does not have, or in a way that is not plain LoRA.
    """
    config = adapter.peft_config
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise SyncError("rollout.sync=merged: the adapter is not plain LoRA; use rollout.sync=adapter")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    deltas = {}
    for name, lora_a in adapter.tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        lora_b = adapter.tensors[name.replace(".lora_A.", ".lora_B.")]
        delta = torch.from_numpy(lora_b) @ torch.from_numpy(lora_a) * scale
        deltas[_checkpoint_name(name, pristine)] = delta.T if config.get("fan_in_fan_out") else delta
    for name, weight in pristine.items():
        delta = deltas.get(name)
        yield name, weight if delta is None else (weight.float() + delta).to(weight.dtype)


def _checkpoint_name(peft_name: str, pristine: dict[str, Tensor]) -> str:
    """The checkpoint's name of an adapted weight; checkpoints may leave out the module name of the trunk."""
    name = peft_name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight") + ".weight"
    for candidate in (name, name.partition(".")[2]):
        if candidate in pristine:
            return candidate
    raise SyncError(f"rollout.sync=merged: the engine's base has no weight {name}; the adapter is of another base")
