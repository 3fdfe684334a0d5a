"""The frozen base's blocks spread over the learners, for a base that fits no device: FSDP, Zhao et al. 2023."""

from typing import Any

import torch
from peft import PeftModel
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from detox_ray.errors import ModelError


def shard_blocks(model: PeftModel, device: torch.device) -> None:
    """Let each learner keep its part of every block's frozen weights, and get the others' while the block computes.

    Adapters, embeddings and the head stay whole on `device`. From then on the learners of the process group, of which
    there must be one, have to call the model equally often.

    Raises:
        ModelError: `transformers` does not say what the model's blocks are.
    """
    blocks = blocks_for("train.shard_base", model)
    adapters = {parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in blocks:
        # A block at a time goes to the device, with what bitsandbytes keeps beside its weights.
        fully_shard(block.to(device), mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    model.to(device)


def blocks_for(option: str, model: PeftModel) -> list[nn.Module]:
    """The model's blocks, for an option that is about them.

    Raises:
        ModelError: `transformers` does not say what they are.
    """
    base = model.get_base_model()
    blocks = transformer_blocks(base)
    if not blocks:
        raise ModelError(f"{option}=true: {type(base).__name__} names no blocks; set it to false")
    return blocks


def transformer_blocks(base: nn.Module) -> list[nn.Module]:
    """The layers of a `transformers` model that belong on one device."""
    names: Any = base._no_split_modules or ()
    return [module for module in base.modules() if type(module).__name__ in names]
