"""What every part of a configuration is, and the places that configurations name."""

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from detox_ray.errors import ConfigError

LAB_PREFIX = "lab:"
FOLDER_NAME = r"^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$"  # not only dots


def is_fraction_above_one(amount: float) -> bool:
    """Which amounts Ray refuses of GPUs and of resources of one's own."""
    return amount > 1 and amount != int(amount)


def _check_custom(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in {"CPU", "GPU", "memory", "object_store_memory"}:
            raise ValueError(f"resources.{name}: only resources of your own; CPUs and GPUs are num_cpus and num_gpus")
        if is_fraction_above_one(amount):
            raise ValueError(f"resources.{name}={amount:g}: above 1 Ray takes whole numbers only")
    return resources


def _check_gpus(amount: float) -> float:
    if is_fraction_above_one(amount):
        raise PydanticCustomError("gpus", "above 1 Ray takes whole numbers only")  # the kind that is told with its key
    return amount


# Names given to `ray start --resources`; a worker is placed on a node that has them.
CustomResources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_check_custom)]
# A share of one GPU, or whole ones.
Gpus = Annotated[float, Field(ge=0), AfterValidator(_check_gpus)]


def cache_folder() -> Path:
    """Where the lab and the answers of paid APIs are kept: `~/.cache/detox_ray`, or what DETOX_RAY_CACHE names."""
    return Path(os.environ.get("DETOX_RAY_CACHE") or "~/.cache/detox_ray").expanduser().absolute()


class Section(BaseModel):
    """A part of the tree: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def absolute_path(path: str | None) -> Any:
    """A path that exists, absolute; anything else (a hub id, an import path) as it is.

    Raises:
        ConfigError: nothing can be there: the name is too long, its user unknown, or its folder closed to this one.
    """
    if path is None:
        return None
    try:
        there = Path(path).expanduser()
        return str(there.resolve()) if there.exists() else path
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path!r} cannot be read ({getattr(error, 'strerror', error)}); give another") from None
