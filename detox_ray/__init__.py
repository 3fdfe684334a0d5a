"""Make a language model less toxic by reinforcement learning from automatic feedback on Ray, and prove it."""

import logging
import os
from typing import TYPE_CHECKING, Any

from detox_ray.config import Config
from detox_ray.config_file import load_config
from detox_ray.errors import (
    ConfigError,
    DataError,
    DetoxError,
    DivergenceError,
    ModelError,
    RewardError,
    StorageError,
    SyncError,
)
from detox_ray.sft_config import load_sft_config

# Ray and the tokenizers read these when they are imported.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)
# Warns on import of a kernel that is optional.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from detox_ray.loop import score, train
    from detox_ray.measurement import evaluate
    from detox_ray.sft import fine_tune

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "DetoxError",
    "DivergenceError",
    "ModelError",
    "RewardError",
    "StorageError",
    "SyncError",
    "evaluate",
    "fine_tune",
    "load_config",
    "load_sft_config",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    """`train`, `fine_tune`, `evaluate` and `score`, imported on first use: they bring torch and Ray."""
    if name == "evaluate":
        from detox_ray.measurement import evaluate

        return evaluate
    if name == "fine_tune":
        from detox_ray.sft import fine_tune

        return fine_tune
    if name in {"train", "score"}:
        from detox_ray import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'detox_ray' has no attribute {name!r}")
