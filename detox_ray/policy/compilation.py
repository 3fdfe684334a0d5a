"""`torch.compile` for the learner's passes: the many small operations of a block become a few kernels."""

import os
import shutil

from peft import PeftModel

from detox_ray.errors import ConfigError
from detox_ray.policy.sharding import blocks_for

# Ways to call a block that are compiled apart: with and without gradient and adapter, and T5's blocks of four kinds.
VARIANTS = 32


def check_compiler() -> None:
    """Raises:
    ConfigError: this machine has no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(f"train.compile=true: there is no {compiler} here; install it, or set train.compile=false")


def compile_blocks(model: PeftModel) -> None:
    """Compile every block when it is first called, for all lengths at once; blocks of a kind share what is compiled.

    Raises:
        ModelError: `transformers` does not say what the model's blocks are.
    """
    for block in blocks_for("train.compile", model):
        block.compile(dynamic=True, recompile_limit=VARIANTS)
