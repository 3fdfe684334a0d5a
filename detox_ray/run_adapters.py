"""The adapters of a run, as its user calls them."""

from pathlib import Path

from detox_ray.config import Config
from detox_ray.run_folder import RunFolder
from detox_ray.sft_config import SFTConfig


def named_adapters(run: RunFolder, config: Config | SFTConfig) -> dict[str, Path]:
    """The adapter that a run started from and the one that it made, as far as there are any, by name."""
    started, made = ("Fine-tuned", "RLAF") if isinstance(config, Config) else ("Before", "Fine-tuned")
    found = {started: Path(config.policy.adapter)} if config.policy.adapter is not None else {}
    return found | ({made: run.adapter} if run.adapter.exists() else {})
