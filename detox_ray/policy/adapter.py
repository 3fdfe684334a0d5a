"""The LoRA adapter as a value: PEFT's format on disk, a content digest, and a version that never goes back."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from transformers.modeling_utils import PreTrainedModel

from detox_ray.errors import ModelError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
DIGEST_FILE = "digest.txt"  # a note that a run keeps beside its adapter


@dataclass(frozen=True)
class Adapter:
    """LoRA weights under PEFT's names (`base_model.model.….lora_A.weight`: [r, in] float32), ready to travel.

    `digest` is the SHA-256 of configuration and tensors; `version` counts the pushes of a run.
    """

    version: int
    digest: str
    peft_config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def content_digest(peft_config: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 over the configuration and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(peft_config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def read_weights(model: PeftModel, version: int) -> Adapter:
    """The active adapter of a PEFT model, copied to the CPU."""
    state = get_peft_model_state_dict(model)
    tensors = {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in state.items()}
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config[model.active_adapter].to_dict().items()
    }
    config["inference_mode"] = True
    config = json.loads(json.dumps(config, default=str))
    return Adapter(version, content_digest(config, tensors), config, tensors)


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
    state = get_peft_model_state_dict(model)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
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
    set_peft_model_state_dict(model, {name: torch.from_numpy(np.array(t)) for name, t in adapter.tensors.items()})


def save_adapter(adapter: Adapter, folder: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write the adapter where plain `PeftModel.from_pretrained(base, folder)` finds it; replaces the folder whole.

    `notes` are small text files, by name, to keep beside it.
    """
    scratch, replaced = (folder.with_name(f"{folder.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    (scratch / TENSOR_FILE).write_bytes(save({n: np.ascontiguousarray(t) for n, t in adapter.tensors.items()}))
    config = json.dumps(adapter.peft_config, indent=2, sort_keys=True)
    for name, text in {CONFIG_FILE: config, **(notes or {})}.items():
        (scratch / name).write_text(text, encoding="utf-8")
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(scratch, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def load_adapter(folder: str | Path, version: int = 0) -> Adapter:
    """Read an adapter in PEFT's format.

    Raises:
        ModelError: a file is missing or broken, or the content has another digest than the one noted beside it.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSOR_FILE)
    except Exception as error:
        raise ModelError(
            f"adapter {folder}: cannot be read ({' '.join(str(error).split())[:120]}); "
            f"expected {CONFIG_FILE} and {TENSOR_FILE}"
        ) from None
    digest = content_digest(config, tensors)
    if (note := folder / DIGEST_FILE).exists() and note.read_text(encoding="utf-8") != digest:
        raise ModelError(
            f"adapter {folder}: damaged, its content does not have the digest in {DIGEST_FILE}; restore it from a copy "
            "or, in a run folder, start the run's command again to restore it from the last checkpoint"
        )
    return Adapter(version, digest, config, tensors)


def is_whole(folder: Path) -> bool:
    """Whether `load_adapter` would load it."""
    try:
        load_adapter(folder)
    except ModelError:
        return False
    return True


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
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"adapter {folder} does not fit {base.config.name_or_path}: {reason}") from None
    return model
