"""Which exact model a classifier is, so that a score can be traced to it."""

import hashlib
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from detox_ray.classifier_config import ClassifierConfig

UNKNOWN = "unversioned"


def model_name(config: ClassifierConfig) -> str:
    """The hub id or import path; of a local folder only its name."""
    return Path(config.model).name if Path(config.model).is_dir() else config.model


def model_revision(config: ClassifierConfig) -> str:
    """The configured revision, else the digest of a local folder, the hub's commit, or the package and its version."""
    folder = Path(config.model)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        return f"sha256:{digest.hexdigest()[:16]}"
    if config.kind == "transformers":
        from transformers import AutoConfig

        loaded = AutoConfig.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
        return getattr(loaded, "_commit_hash", None) or config.revision or UNKNOWN
    package = config.model.partition(":")[0].partition(".")[0]
    try:
        distribution = packages_distributions()[package][0]
        return f"{distribution}=={version(distribution)}"
    except (KeyError, PackageNotFoundError):
        return config.revision or UNKNOWN
