"""The configuration of an evaluation: which systems answer which prompts, and who judges the answers."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from detox_ray.classifier_config import ClassifierConfig, make_classifier_absolute
from detox_ray.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    PolicyConfig,
    RayConfig,
    ResponseColumns,
    RolloutConfig,
    make_sources_absolute,
)
from detox_ray.config_file import Overrides, parse_section, read_tree
from detox_ray.config_section import FOLDER_NAME, Section, absolute_path
from detox_ray.data.sources import FILE_SUFFIXES
from detox_ray.errors import ConfigError
from detox_ray.metrics_file import DEV_PROMPTS_FILE
from detox_ray.run_folder import RunFolder
from detox_ray.serving.api_config import is_of_service, load_api_config
from detox_ray.sft_config import SFTConfig, parse_run_config

SAMPLES_PER_PROMPT = 25  # of RealToxicityPrompts, as are the 20 tokens of RolloutConfig


class SystemConfig(Section):
    """One of the systems that are compared: a model, with or without an adapter, or a file of responses."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.+ -]+$", description="in tables and figures")
    policy: PolicyConfig | None = Field(None, description="the model that answers, with policy.adapter if it is set")
    responses: str | None = Field(None, description="or a JSONL, CSV or Parquet file of answers somebody else made")
    columns: ResponseColumns = ResponseColumns()

    @model_validator(mode="after")
    def _one_kind(self) -> "SystemConfig":
        if (self.policy is None) == (self.responses is None):
            raise ValueError(f"system {self.name!r}: give either policy or responses")
        return self


class MeterConfig(Section):
    """An evaluation by the RealToxicityPrompts protocol (Gehman et al. 2020)."""

    name: str = Field("evaluation", pattern=FOLDER_NAME, description="of the folder")
    output_dir: str = Field("runs", description="folder of evaluation folders")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of every random choice")
    systems: list[SystemConfig] = Field(min_length=1, description="the first is what the others are compared with")
    data: DataConfig = DataConfig()
    heldout_of_run: bool = Field(False, description="only the prompts that a run with this data and seed holds out")
    prompts: int | None = Field(None, ge=1, description="at most this many prompts, chosen by seed and text; none: all")
    rollout: RolloutConfig = RolloutConfig(samples_per_prompt=SAMPLES_PER_PROMPT)
    scorers: list[ClassifierConfig] = Field([EvaluationConfig().judge], description="the first is the judge")
    perplexity_model: str | None = Field(None, description="folder or hub id of a language model; none: no perplexity")
    perplexity_revision: str | None = Field(None, description="commit or tag, when it is a hub id")
    relevance_model: str | None = Field(None, description="sentence-embedding model for the similarity to the prompt")
    relevance_revision: str | None = Field(None, description="commit or tag, when it is a hub id")
    bootstrap_resamples: int = Field(2000, ge=100, description="resamples of the prompts for the 95% intervals")
    ray: RayConfig = RayConfig()

    @property
    def folder(self) -> Path:
        """`output_dir/name`, absolute."""
        return (Path(self.output_dir) / self.name).resolve()

    @field_validator("rollout", mode="before")
    @classmethod
    def _as_many_responses_as_the_protocol(cls, value: Any) -> Any:
        return {"samples_per_prompt": SAMPLES_PER_PROMPT, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _names_are_unique(self) -> "MeterConfig":
        for key, names in (("systems", [s.name for s in self.systems]), ("scorers", [s.name for s in self.scorers])):
            if repeated := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{key}: name {min(repeated)!r} is used twice; give each its own")
        return self

    def with_absolute_paths(self) -> "MeterConfig":
        """The same with every model, adapter and file that exists here made absolute, for other processes."""
        tree = self.model_dump()
        make_sources_absolute(tree["data"])
        for key in ("perplexity_model", "relevance_model"):
            tree[key] = absolute_path(tree[key])
        for scorer in tree["scorers"]:
            make_classifier_absolute(scorer)
        for system in tree["systems"]:
            system["responses"] = absolute_path(system["responses"])
            for key in ("model", "adapter"):
                if system["policy"] is not None:
                    system["policy"][key] = absolute_path(system["policy"][key])
        return MeterConfig.model_validate(tree)


def meter_config(target: str | Path, overrides: Overrides = ()) -> MeterConfig:
    """The evaluation of a YAML file, a run folder, a file of responses, or a model (folder or hub id).

    A run folder means its base and its adapter on its held-out prompts, by its judge and its reward's classifiers.
    Dotted overrides such as `rollout.samples_per_prompt=4` change any value.

    Raises:
        ConfigError: nothing of the kind is there, a key is unknown, or a value is out of bounds.
    """
    path = Path(target)
    if path.suffix in {".yaml", ".yml"}:
        return parse_section(MeterConfig, read_tree(path, overrides))
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        run = RunFolder.existing(path)
        if not run.adapter.exists():
            raise ConfigError(f"{path} has no adapter yet; continue the run with the command that started it")
        of_run = meter_of_folder(run)
        meter = parse_section(MeterConfig, read_tree(of_run.model_dump(), overrides))
        _keep_apart(meter, of_run)
        return meter
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{path} is neither a run folder (no config.yaml) nor a model (no config.json)")
    name = path.stem if path.suffix in FILE_SUFFIXES else path.name
    system: dict[str, Any] = {"name": name}
    if path.suffix in FILE_SUFFIXES:
        system["responses"] = str(target)
    else:
        system["policy"] = {"model": str(target), "quantization": "none"}
    tree: dict[str, Any] = {"name": f"evaluation-{name}", "systems": [system]}
    if system.get("policy"):
        tree["perplexity_model"] = str(target)
    return parse_section(MeterConfig, read_tree(tree, overrides))


def _keep_apart(meter: MeterConfig, of_run: MeterConfig) -> None:
    """Keep training prompts out of the held-out ones, and other prompts out of the run's own evaluation.

    Raises:
        ConfigError: the overrides of a run's evaluation mix them.
    """
    if not of_run.heldout_of_run and meter.folder == of_run.folder and meter.data.source != of_run.data.source:
        raise ConfigError(f"other prompts would replace the evaluation of {of_run.name}; give them a name=... too")
    if meter.heldout_of_run and (meter.data, meter.seed) != (of_run.data, of_run.seed):
        raise ConfigError(
            f"with another data or seed, prompts that {of_run.name} was trained on would count as held out; keep both, "
            "or name prompts it has never seen: data.source=... heldout_of_run=false name=..."
        )
    if of_run.heldout_of_run and not meter.heldout_of_run and meter.folder == of_run.folder:
        raise ConfigError(f"heldout_of_run=false would replace the evaluation of {of_run.name}; give it a name=... too")


def meter_of_folder(run: RunFolder) -> MeterConfig:
    """The evaluation of a run of either kind.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    config = parse_run_config(run.read_config_tree())
    return meter_of_run(run, config) if isinstance(config, Config) else meter_of_tuning(run, config)


def meter_of_tuning(run: RunFolder, config: SFTConfig) -> MeterConfig:
    """The evaluation of a fine-tuning's base and adapter on the prompts of its dev examples, by the default judge.

    Raises:
        ConfigError: the prompts are not in the folder.
    """
    prompts, evaluation = run.path / DEV_PROMPTS_FILE, EvaluationConfig()
    if not prompts.is_file():
        raise ConfigError(f"{prompts} is missing; the command that started the run writes it again")
    start = config.policy.model_copy(update={"adapter": None, "reference": "base"})
    return MeterConfig(
        name=run.path.name,
        output_dir=str(run.path.parent),
        seed=config.seed,
        systems=[
            SystemConfig(name="base", policy=start),
            SystemConfig(name="fine-tuned", policy=start.model_copy(update={"adapter": str(run.adapter)})),
        ],
        # Whole prompts: a cut would take away what the template ends them with.
        data=DataConfig(source=str(prompts), max_tokens=config.data.max_tokens, too_long="drop"),
        prompts=evaluation.prompts,
        rollout=RolloutConfig(samples_per_prompt=evaluation.samples_per_prompt),
        perplexity_model=config.policy.model,
        perplexity_revision=config.policy.revision,
        ray=config.ray,
    )


def meter_of_run(run: RunFolder, config: Config) -> MeterConfig:
    """The evaluation of a run's base and adapter on its held-out prompts, by its judge and its reward's classifiers.

    An adapter that the run started from is evaluated between them.
    """
    adapters: dict[str, str | None] = {"base": None, "fine-tuned": config.policy.adapter, "tuned": str(run.adapter)}
    if config.policy.adapter is None:
        del adapters["fine-tuned"]
    return MeterConfig(
        name=run.path.name,
        output_dir=str(run.path.parent),
        seed=config.seed,
        systems=[
            SystemConfig(name=name, policy=config.policy.model_copy(update={"adapter": adapter, "reference": "base"}))
            for name, adapter in adapters.items()
        ],
        data=config.data,
        heldout_of_run=True,
        prompts=config.evaluation.prompts,
        rollout=config.rollout.model_copy(update={"samples_per_prompt": config.evaluation.samples_per_prompt}),
        scorers=[config.evaluation.judge, *config.reward.classifiers],
        perplexity_model=config.policy.model,
        perplexity_revision=config.policy.revision,
        bootstrap_resamples=config.evaluation.bootstrap_resamples,
        ray=config.ray,
    )


class ScorerList(Section):
    """Scorers alone."""

    scorers: list[ClassifierConfig] = Field(description="the first is the judge")


def load_scorers(path: str | Path | None) -> ScorerList:
    """The scorers of an evaluation's or the service's YAML file, or the judge and the reward's classifiers of a run's.

    None is the embedded service.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is out of bounds.
    """
    tree = {} if path is None else read_tree(path)
    if "systems" in tree:
        return ScorerList(scorers=parse_section(MeterConfig, tree).scorers)
    if path is None or is_of_service(tree):
        return ScorerList(scorers=load_api_config(path, calibrated=False).reward.classifiers)
    config = parse_section(Config, tree)
    return ScorerList(scorers=[config.evaluation.judge, *config.reward.classifiers])
