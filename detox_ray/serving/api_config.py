"""The typed configuration of the scoring service: which classifiers, what they are called in each API, and limits."""

import copy
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from detox_ray.classifier_config import make_classifier_absolute
from detox_ray.config import Config, RayConfig, RewardConfig
from detox_ray.config_file import Overrides, parse_config, parse_section, read_tree
from detox_ray.config_section import Section
from detox_ray.errors import ConfigError
from detox_ray.rewards.ensemble import with_calibrations
from detox_ray.run_folder import RunFolder
from detox_ray.serving.calibration_table import CalibrationTable, read_table

Category = Literal[
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
]

# The service without a configuration. The lab's classifier knows the lab's rudeness and no other (ROC-AUC 0.48 on web
# text), so it is there to be seen, and toxicity is what the other one says.
EMBEDDED: dict[str, Any] = {
    "reward": {
        "classifiers": [
            {
                "name": "alt-profanity-check",
                "kind": "linear",
                "model": "profanity_check:predict_prob",
                "output": "probability",
                "calibration": "none",
            },
            {
                "name": "lab-transformer",
                "kind": "transformers",
                "model": "lab:classifier",
                "label": "rude",
                "output": "probability",
                "calibration": "none",
            },
        ]
    },
    "attributes": {"TOXICITY": {"classifier": "alt-profanity-check"}},
    "categories": {"harassment": {"classifier": "alt-profanity-check"}},
}


class Source(Section):
    """Whose probability something is."""

    classifier: str | None = Field(None, description="a classifier's name; none: the mean over all of them")
    label: str | None = Field(
        None, description="a label of that classifier; none: the toxicity it is configured to read"
    )


class AttributeSource(Source):
    """Where a Perspective attribute comes from."""

    languages: list[str] = Field(["en"], min_length=1, description="languages it may be asked in")


class CategorySource(Source):
    """Where a category of the moderations API comes from."""

    threshold: float = Field(0.5, ge=0, le=1, description="from this probability on the category is flagged")


class LimitsConfig(Section):
    """What a request may hold and how long it may take; what is beyond is refused, with the limit in the answer."""

    request_bytes: int = Field(4 * 2**20, ge=1024, description="longest body; longer ones are not read to the end")
    texts: int = Field(1000, ge=1, description="texts in a request")
    characters: int = Field(20_480, ge=1, description="characters of a text")
    spans: int = Field(100, ge=1, description="spans a text is divided into; more sentences than that are merged")
    requests: int = Field(256, ge=1, description="requests under way in a replica; then 429")
    queued_texts: int = Field(4096, ge=1, description="texts and spans under way in a replica; then 429")
    body_timeout_s: float = Field(10.0, gt=0, description="longest a client may take to send its body")
    timeout_s: float = Field(30.0, gt=0, description="longest the classifiers may take; then 504")


class BatchingConfig(Section):
    """How texts of concurrent requests are put together."""

    texts: int = Field(64, ge=1, description="most texts in a batch; a longer list is a batch of its own")
    in_flight: int = Field(2, ge=1, description="batches under way; what arrives meanwhile makes the next one")


class ScalingConfig(Section):
    """Replicas of a classifier; above `min` they come and go with the load."""

    min: int = Field(1, ge=1, description="replicas that are always there")
    max: int = Field(1, ge=1, description="replicas under the highest load")
    target_ongoing_requests: float = Field(1.0, gt=0, description="batches waiting for a replica before there are more")

    @model_validator(mode="after")
    def _is_a_range(self) -> "ScalingConfig":
        if self.min > self.max:
            raise ValueError(f"replicas.min={self.min} is above replicas.max={self.max}")
        return self


class KeysConfig(Section):
    """Who may ask; without `environment` and `file` anyone who reaches the port."""

    environment: str | None = Field(None, description="environment variable with the keys, separated by commas")
    file: str | None = Field(None, description="file with one key per line; lines that begin with # are comments")
    requests_per_second: float | None = Field(None, gt=0, description="of each key, on average; then 429")
    burst: int = Field(20, ge=1, description="requests a key may make at once")


class HttpConfig(Section):
    """Where the service listens."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all: set keys first")
    port: int = Field(8000, ge=1, le=65535, description="TCP port to listen on")
    public_url: str | None = Field(
        None, pattern=r"^https?://[^\s/]+/?$", description="address clients use, when a proxy stands before the service"
    )
    cors_origins: list[str] = Field(
        [], description="web pages that may ask from a browser, such as https://example.org"
    )
    replicas: int = Field(1, ge=1, description="HTTP replicas; queue, cache, rates and metrics are each replica's own")


class ApiConfig(Section):
    """The scoring service."""

    reward: RewardConfig = Field(description="the classifiers, as in a training run; none: the embedded service")
    replicas: dict[str, ScalingConfig] = Field({}, description="by classifier; others have `replicas` fixed ones")
    attributes: dict[str, AttributeSource] = Field(
        {"TOXICITY": AttributeSource()}, description="Perspective attributes this service has"
    )
    categories: dict[Category, CategorySource] = Field(
        {"harassment": CategorySource()}, description="categories of the moderations API this service has"
    )
    calibration: CalibrationTable = Field(
        CalibrationTable(), description="of the probabilities: the path of a file that detox-ray calibrate wrote"
    )
    limits: LimitsConfig = LimitsConfig()
    batching: BatchingConfig = BatchingConfig()
    cache_texts: int = Field(10_000, ge=0, description="texts whose scores are remembered, by content hash; 0: none")
    keys: KeysConfig = KeysConfig()
    http: HttpConfig = HttpConfig()
    ray: RayConfig = RayConfig()

    @property
    def sources(self) -> dict[str, Source]:
        """Where attributes and categories come from, by the key of each."""
        found: dict[str, Source] = {f"attributes.{name}": source for name, source in self.attributes.items()}
        return found | {f"categories.{name}": source for name, source in self.categories.items()}

    def classifiers_of(self, source: Source) -> list[str]:
        """The names of the classifiers whose toxicity or label `source` is."""
        return [c.name for c in self.reward.classifiers] if source.classifier is None else [source.classifier]

    @model_validator(mode="before")
    @classmethod
    def _embedded_without_classifiers(cls, values: Any) -> Any:
        return values if not isinstance(values, dict) or "reward" in values else EMBEDDED | values

    @model_validator(mode="after")
    def _names_exist(self) -> "ApiConfig":
        names = {c.name for c in self.reward.classifiers}
        for key, source in self.sources.items():
            if source.classifier is None and source.label is not None:
                raise ValueError(f"{key}.label={source.label!r} needs a classifier: name the one it is a label of")
            if source.classifier is not None and source.classifier not in names:
                raise ValueError(
                    f"{key}.classifier={source.classifier!r} is no classifier; there are {', '.join(sorted(names))}"
                )
        if unknown := set(self.replicas) - names:
            raise ValueError(f"replicas.{min(unknown)} is no classifier; there are {', '.join(sorted(names))}")
        self._check_calibration(names)
        if self.limits.queued_texts < self.limits.texts + self.limits.spans:
            raise ValueError(
                f"limits.queued_texts={self.limits.queued_texts} is below limits.texts + limits.spans = "
                f"{self.limits.texts + self.limits.spans}: the longest request would never be taken"
            )
        return self

    def _check_calibration(self, names: set[str]) -> None:
        fix = "run detox-ray calibrate again, or leave calibration out"
        if unknown := set(self.calibration.models) - names:
            raise ValueError(f"calibration.models.{min(unknown)} is no classifier of the service; {fix}")
        for key, fitted in self.calibration.sources.items():
            source = self.sources.get(key)
            if source is None:
                raise ValueError(f"calibration.{key}: the service has no {key}; {fix}")
            if (sorted(fitted.classifiers), fitted.label) != (sorted(self.classifiers_of(source)), source.label):
                was = ", ".join(fitted.classifiers) + (f", label {fitted.label}" if fitted.label else "")
                raise ValueError(f"calibration.{key} was fitted for {was}, which {key} no longer reads; {fix}")


def is_of_service(tree: dict[str, Any]) -> bool:
    """Whether a plain tree has a section that only the service has."""
    return bool(tree.keys() & (ApiConfig.model_fields.keys() - Config.model_fields.keys()))


def load_api_config(
    source: str | Path | dict[str, Any] | None, overrides: Overrides = (), calibrated: bool = True
) -> ApiConfig:
    """The service's configuration in a YAML file or a tree, or the embedded one, with dotted overrides applied.

    The file of a training run will do: its sections `reward` and `ray` are taken, with the calibrations it has fitted,
    and any of the service beside them. Without `calibrated` the file's `calibration` is not even looked at.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is out of bounds.
    """
    given = read_tree({} if source is None else copy.deepcopy(source))
    tree = read_tree(given if "reward" in given else copy.deepcopy(EMBEDDED) | given, overrides)
    table = tree.pop("calibration", None)
    if "reward" in tree and tree.keys() & (Config.model_fields.keys() - ApiConfig.model_fields.keys()):
        only_service = ApiConfig.model_fields.keys() - Config.model_fields.keys()
        of_service = {key: tree.pop(key) for key in only_service & tree.keys()}
        run = parse_config(tree)
        reward = run.reward if isinstance(source, dict | None) else _as_fitted(run.reward, Path(source).parent)
        tree = {"reward": reward.model_dump(), "ray": run.ray.model_dump(), **of_service}
    if calibrated and table is not None:
        tree["calibration"] = read_table(table) if isinstance(table, str) else table
    tree = parse_section(ApiConfig, tree).model_dump()
    for classifier in tree["reward"]["classifiers"]:
        make_classifier_absolute(classifier)
    return ApiConfig.model_validate(tree)


def _as_fitted(reward: RewardConfig, folder: Path) -> RewardConfig:
    """With the calibrations that the run in a folder, if it is one, has fitted."""
    fitted = RunFolder(folder).read_calibrations() or {}
    unfitted = {c.name for c in reward.classifiers if c.calibration == "fit"}
    return with_calibrations(reward, {name: found for name, found in fitted.items() if name in unfitted})


def load_keys(config: KeysConfig) -> tuple[str, ...]:
    """The API keys; none when the service is open.

    Raises:
        ConfigError: the variable or the file is missing or holds no key: the service would be open by mistake.
    """
    keys: list[str] = []
    if config.environment is not None:
        keys += os.environ.get(config.environment, "").split(",")
    if config.file is not None:
        try:
            lines = Path(config.file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"keys.file={config.file!r} cannot be read: {type(error).__name__}") from None
        keys += [line for line in lines if not line.lstrip().startswith("#")]
    found = tuple(sorted({key.strip() for key in keys if key.strip()}))
    if not found and (config.environment or config.file):
        where = " and ".join(name for name in (config.environment, config.file) if name)
        raise ConfigError(f"keys: {where} holds no API key; put one there, or leave keys out for an open service")
    return found
