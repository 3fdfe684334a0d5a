"""What every part of a configuration is, and the places that configurations name."""

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

LAB_PREFIX = "lab:"


def cache_folder() -> Path:
    """Where the lab and the answers of paid APIs are kept: `~/.cache/detox_ray`, or what DETOX_RAY_CACHE names."""
    return Path(os.environ.get("DETOX_RAY_CACHE") or "~/.cache/detox_ray").expanduser().absolute()


class Section(BaseModel):
    """A part of the tree: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def absolute_path(path: str | None) -> Any:
    """A path that exists, absolute; anything else (a hub id, an import path) as it is."""
    if path is None or not Path(path).expanduser().exists():
        return path
    return str(Path(path).expanduser().resolve())
