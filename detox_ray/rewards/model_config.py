"""What is known of a sequence classifier before its weights are loaded."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import ConfigError, ModelError
from detox_ray.hub import why_not_loaded

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def check_sequence_classifier(config: ClassifierConfig) -> str:
    """The name of the label that `config` reads, once model and label are known to exist.

    Raises:
        ConfigError: the model has no such label.
        ModelError: the model is missing, or a folder without safetensors weights, or with damaged ones.
    """
    names = load_model_config(config).id2label
    label = label_index(config, names)
    folder = Path(config.model)
    if folder.is_dir():
        _check_weights(config.name, folder)
    return {int(index): name for index, name in names.items()}[label]


def _check_weights(name: str, folder: Path) -> None:
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"classifier {name!r}: no *.safetensors in {folder}; save the model with safe serialization")
    for file in files:
        try:
            with safe_open(file, framework="numpy"):  # reads the header, and compares the length of the file with it
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"classifier {name!r}: {file} is damaged ({error}); copy or save it again") from None


def load_model_config(config: ClassifierConfig) -> Any:
    """The model's own configuration, from the folder or the hub."""
    from transformers import AutoConfig

    where = f"classifier {config.name!r}: {config.model!r}"
    folder = Path(config.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{where} has no config.json; give the folder that save_pretrained wrote")
    elif not HUB_ID.fullmatch(config.model):
        raise ModelError(f"{where} does not exist; give the folder of a sequence classifier, or its hub id")
    try:
        return AutoConfig.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{where} cannot be read: {why_not_loaded(config.model, error)}") from None


def label_index(config: ClassifierConfig, id2label: dict[int, str]) -> int:
    """The index of the label that `config` names; raises ConfigError with the labels there are."""
    names = {int(index): name for index, name in id2label.items()}
    if config.label in names:
        return int(config.label)
    for index, name in names.items():
        if name == config.label:
            return index
    listed = ", ".join(f"{index}={name}" for index, name in sorted(names.items()))
    raise ConfigError(
        f"classifier {config.name!r}: {config.model!r} has no label {config.label!r}; its labels: {listed}"
    )
