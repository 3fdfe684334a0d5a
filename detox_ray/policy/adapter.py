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
from safetensors.numpy import load_file, save

from detox_ray.errors import ModelError, one_line

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
DIGEST_FILE = "digest.txt"  # a note that a run keeps beside its adapter


@dataclass(frozen=True)
class Adapter:
    """LoRA weights under PEFT's names (`base_model.model.….lora_A.weight`: [r, in] float32), ready to travel.

    `digest` is the SHA-256 of configuration and tensors; `version` counts the pushes of a run (0: it is not pushed).
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
        shutil.rmtree(replaced, ignore_errors=True)  # of a killed process of this number
        os.replace(folder, replaced)
    os.replace(scratch, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def load_adapter(folder: str | Path) -> Adapter:
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
            f"adapter {folder}: cannot be read ({one_line(error)}); expected {CONFIG_FILE} and {TENSOR_FILE}"
        ) from None
    digest = content_digest(config, tensors)
    if (note := folder / DIGEST_FILE).exists() and note.read_text(encoding="utf-8") != digest:
        raise ModelError(
            f"adapter {folder}: damaged, its content does not have the digest in {DIGEST_FILE}; restore it from a copy "
            "or, in a run folder, start the run's command again to restore it from the last checkpoint"
        )
    return Adapter(0, digest, config, tensors)


def is_whole(folder: Path) -> bool:
    """Whether `load_adapter` would load it."""
    try:
        load_adapter(folder)
    except ModelError:
        return False
    return True
