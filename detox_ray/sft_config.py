"""The configuration of a supervised fine-tuning."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from detox_ray.config import Config, DialogueFormat, PolicyConfig, RunSettings, Template
from detox_ray.config_file import Overrides, parse_section, read_tree
from detox_ray.config_section import Section, absolute_path
from detox_ray.learner_config import LearnerConfig, refuse_sharded_int8
from detox_ray.ppo_config import OptimizerConfig


class ExampleConfig(Section):
    """Which prompts and responses are learned from, and how they are written."""

    source: str = Field("lab:answers", description="JSONL, CSV, TSV or Parquet file, or lab:answers")
    format: DialogueFormat | None = Field(None, description="of the file; none: told by its columns")
    prompt_column: str = Field("prompt", min_length=1, description="column with the prompt, when the format is pairs")
    response_column: str = Field("response", min_length=1, description="column with the response, likewise")
    template: Template = Field(
        "auto",
        description="what is written around prompts: chat: the tokenizer's chat template; auto: that, or a plain one "
        "where there is none; none; or a text with {prompt}",
    )
    turn_separator: str = Field("\n", description="between an answer and the next turn, unless the template is chat")
    dev_source: str | None = Field(None, description="file of examples for the dev loss; none: some of the source")
    dev_examples: int = Field(
        200,
        ge=1,
        description="examples for the dev loss; of the source whole dialogues with so many different prompts, chosen "
        "by seed and text as data.heldout_prompts of `detox-ray train` are",
    )
    max_tokens: int = Field(256, ge=2, description="longest prompt and response together, in tokens")
    too_long: Literal["trim", "drop"] = Field(
        "trim", description="of a dialogue leave out the earliest turns until it fits, or drop it; both are counted"
    )
    limit: int | None = Field(None, ge=1, description="train on at most this many examples (seeded choice)")


class TuningConfig(OptimizerConfig, LearnerConfig):
    """How long, in what steps and on what the adapter is trained."""

    epochs: int = Field(3, ge=1, description="passes over the examples")
    total_steps: int | None = Field(None, ge=1, description="optimiser steps, instead of epochs")
    batch_size: int = Field(32, ge=1, description="examples of an optimiser step, over all learner workers")
    microbatch_tokens: int = Field(
        4096, ge=1, description="largest forward pass, padding included (one example may be longer)"
    )
    evaluate_every: int = Field(50, ge=1, description="steps between looks at the dev loss; each saves a checkpoint")
    patience: int | None = Field(
        3, ge=1, description="stop after so many looks in a row without a lower dev loss; null: never"
    )

    @model_validator(mode="after")
    def _batch_divides(self) -> "TuningConfig":
        if self.batch_size % self.workers:
            raise ValueError(
                f"train.batch_size={self.batch_size} is not a multiple of train.workers={self.workers}; change one"
            )
        return self


class SFTConfig(RunSettings):
    """A supervised fine-tuning run."""

    data: ExampleConfig = ExampleConfig()
    policy: PolicyConfig = PolicyConfig()
    train: TuningConfig = TuningConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "SFTConfig":
        refuse_sharded_int8(self.policy.quantization, self.train)
        return self

    def with_absolute_paths(self) -> "SFTConfig":
        """The same with every model, adapter and file that exists here made absolute, for other processes."""
        tree = self.model_dump()
        for section, keys in (("data", ("source", "dev_source")), ("policy", ("model", "adapter"))):
            for key in keys:
                tree[section][key] = absolute_path(tree[section][key])
        return SFTConfig.model_validate(tree)


def load_run_config(path: str | Path, overrides: Overrides = ()) -> Config | SFTConfig:
    """The configuration of a run of either kind, told by its sections; errors as `load_config`."""
    return parse_run_config(read_tree(path, overrides))


def parse_run_config(tree: dict[str, Any]) -> Config | SFTConfig:
    """A run of either kind in a plain tree: what has none of the sections about rewards and rollouts is a fine-tuning.

    Errors as `load_config`.
    """
    of_detoxification = Config.model_fields.keys() - SFTConfig.model_fields.keys()
    if tree.keys() & of_detoxification:
        return parse_section(Config, tree)
    return parse_section(SFTConfig, tree)


def load_sft_config(path: str | Path, overrides: Overrides = ()) -> SFTConfig:
    """The configuration in a YAML file with dotted overrides applied; errors as `load_config`."""
    return parse_section(SFTConfig, read_tree(path, overrides))
