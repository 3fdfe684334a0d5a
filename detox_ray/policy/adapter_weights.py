"""The adapter in a model: read out of it, written into it, put on it. What imports this imports PEFT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from detox_ray.errors import ModelError, one_line
from detox_ray.policy.adapter import Adapter, content_digest


def read_weights(model: PeftModel, version: int) -> Adapter:
    """The active adapter of a PEFT model, copied to the CPU."""
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config[model.active_adapter].to_dict().items()
    }
    config["inference_mode"] = True
    config = json.loads(json.dumps(config, default=str))
    return adapter_of(config, _weights(model), version)


def _weights(model: PeftModel) -> dict[str, Tensor]:
    # What PEFT takes by itself; but it would ask the hub, each time, whether the embeddings were resized.
    targets = model.peft_config[model.active_adapter].target_modules or ()
    targeted = any(name in targets for name in EMBEDDING_LAYER_NAMES)
    return get_peft_model_state_dict(model, save_embedding_layers=targeted)


def adapter_of(peft_config: dict[str, Any], tensors: Mapping[str, Tensor], version: int = 0) -> Adapter:
    """The adapter of these weights, copied to the CPU."""
    arrays = {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in tensors.items()}
    return Adapter(version, content_digest(peft_config, arrays), peft_config, arrays)


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """A copy of the adapter's weights."""
    return {name: torch.from_numpy(np.array(array)) for name, array in adapter.tensors.items()}


def check_fits(model: PeftModel, adapter: Adapter) -> None:
    """Compare the names and shapes of the model's adapter with those of `adapter`.

    Raises:
        ModelError: a tensor is missing, left over, or of another shape: the adapter belongs to another base.
    """
    own = model.peft_config[model.active_adapter].to_dict()
    for key in ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if (adapter.peft_config.get(key) or 0) != (own.get(key) or 0):
            raise ModelError(
                f"adapter has {key}={adapter.peft_config.get(key)!r} and policy.lora makes {key}={own.get(key)!r}; "
                "set policy.lora to what the adapter was trained with"
            )
    expected = {name: tuple(tensor.shape) for name, tensor in _weights(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    if expected != found:
        name = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise ModelError(
            f"adapter does not fit the base model: {name} is {found.get(name, 'absent')} in the adapter and "
            f"{expected.get(name, 'absent')} here; use the base, lora.rank and lora.targets it was trained with"
        )


def write_weights(model: PeftModel, adapter: Adapter) -> None:
    """Load an adapter's tensors into a PEFT model of the same shape.

    Raises:
        ModelError: as `check_fits`.
    """
    check_fits(model, adapter)
    set_peft_model_state_dict(model, tensors_of(adapter))


def put_adapters(base: PreTrainedModel, adapters: Mapping[str, Path]) -> Any:
    """The base with saved adapters on it, under names that PEFT takes (no dots); the base itself where there are none.

    Raises:
        ModelError: an adapter cannot be read or was made for another base.
    """
    model: Any = base
    for name, folder in adapters.items():
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = one_line(error)
            raise ModelError(f"adapter {folder} does not fit {base.config.name_or_path}: {reason}") from None
    return model
