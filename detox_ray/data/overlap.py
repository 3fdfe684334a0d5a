"""Whether an adapter that a run starts from may have learned from the prompts the run holds out."""

from pathlib import Path

from detox_ray.config import Config
from detox_ray.sft_config import SFTConfig, load_run_config


def heldout_may_be_learned(config: Config) -> str | None:
    """Why, in a line, for an adapter in a fine-tuning's folder; None where it cannot be, or is not known.

    `config` as it was given, `lab:` names included.
    """
    adapter = config.policy.adapter
    if adapter is None or not (file := Path(adapter).parent / "config.yaml").is_file():
        return None
    tuning = load_run_config(file)
    if not isinstance(tuning, SFTConfig) or tuning.data.source not in {part.source for part in config.data.sources}:
        return None
    wanted, kept = config.data.heldout_prompts, tuning.data.dev_examples
    if tuning.data.dev_source is not None:
        reason = "its dev examples came from another file"
    elif tuning.seed != config.seed:
        reason = f"it had seed={tuning.seed}"
    elif kept < wanted:
        reason = f"its data.dev_examples={kept} is below data.heldout_prompts={wanted}"
    else:
        return None
    return (
        f"caution: {adapter} was fine-tuned on {tuning.data.source}, and {reason}: prompts held out here may be among "
        "those it learned from"
    )
