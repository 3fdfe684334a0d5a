"""The configuration of a toxicity classifier of any kind."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from detox_ray.config_section import CustomResources, Gpus, Section, absolute_path, cache_folder

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
# How classifiers name what is not toxic, as letters alone.
CIVIL_LABELS = {
    *("nothate", "nonhate", "nothateful", "nonhateful", "nontoxic", "nottoxic", "nonoffensive", "notoffensive"),
    *("neutral", "normal", "benign", "civil", "polite", "harmless", "safe", "clean", "acceptable"),
}


class Calibration(Section):
    """score -> (score - mean) / std, cut at 10 either way, so that members of an ensemble have one scale."""

    mean: float = Field(0.0, description="of the raw scores it was fitted on")
    std: float = Field(1.0, gt=0, description="their standard deviation")


class PerspectiveConfig(Section):
    """How Perspective API, or a server that speaks its protocol, is asked (`kind: perspective`)."""

    address: Annotated[str, AfterValidator(lambda v: v.rstrip("/"))] = Field(
        "https://commentanalyzer.googleapis.com", pattern=r"^https?://[^\s/?#@]+[^\s?#@]*$", description="of the server"
    )
    attributes: list[Annotated[str, Field(pattern=r"^\w+$")]] = Field(
        ["TOXICITY", "SEVERE_TOXICITY", "IDENTITY_ATTACK", "INSULT", "PROFANITY", "THREAT"],
        min_length=1,
        description="all are requested and kept; they cost one request together",
    )
    languages: list[str] = Field([], description="of the texts, as ISO 639-1 codes; none: the server detects it")
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = Field(
        "PERSPECTIVE_API_KEY", description="environment variable that holds the key; null: the server needs none"
    )
    requests_per_second: float = Field(1.0, gt=0, description="of one process; a project's quota is 1 unless raised")
    timeout_s: float = Field(30.0, gt=0, description="longest wait to connect, and for the next part of an answer")
    retries: int = Field(5, ge=0, description="attempts after a failed request, ever farther apart")
    cache: Annotated[str, AfterValidator(lambda v: str(Path(v).expanduser().absolute()))] | None = Field(
        default_factory=lambda: str(cache_folder() / "perspective.sqlite"),
        description="file of answers, none of them paid for twice; null: the last 10,000, while the process lives",
    )

    @model_validator(mode="after")
    def _key_is_not_sent_in_the_clear(self) -> "PerspectiveConfig":
        url = urlsplit(self.address)
        if url.scheme == "http" and url.hostname not in LOOPBACK and self.api_key_env is not None:
            raise ValueError(
                f"perspective.address={self.address} would carry the key unencrypted: use https, or api_key_env: null"
            )
        return self


class ClassifierConfig(Section):
    """A toxicity classifier. Its score is signed so that less toxic is higher, whatever `label` means."""

    name: Annotated[str, AfterValidator(lambda v: v.strip())] = Field(
        min_length=1, pattern=r"^[A-Za-z0-9_.-]+$", description="in metrics, tables and answers of the service"
    )
    kind: Literal["transformers", "linear", "perspective", "evaluate"] = Field(
        description="a sequence classifier; texts -> probabilities on the CPU; Perspective API, or a server that "
        "speaks it; the toxicity measurement of `evaluate`"
    )
    model: str = Field(
        description="transformers, evaluate: folder or hub id; linear: `package.module:function`, or a folder the lab "
        "made; perspective: leave it"
    )
    revision: str | None = Field(None, description="commit or tag, when the model is a hub id")
    label: str | int = Field(
        "toxic",
        description="label to read, by name or index (linear models have one: leave it); perspective: the attribute "
        "that is read as toxicity, TOXICITY by default",
    )
    label_means: Literal["toxic", "nontoxic"] = Field("toxic", description="what a high value of that label says")
    output: Literal["logit", "logprob", "probability"] = Field("logit", description="form of the value that is read")
    calibration: Calibration | Literal["fit", "none"] = Field(
        "fit",
        description="numbers; fit: on the untrained policy's responses when the run starts; both cut at 10 std; none",
    )
    weight: float = Field(1.0, gt=0, description="weight when reward.aggregation is weighted")
    max_length: int = Field(256, ge=8, description="longest text, in the classifier's tokens; longer ones are cut")
    temperature: float = Field(1.0, gt=0, description="the logits are divided by it (Guo et al. 2017)")
    batch_size: int = Field(32, ge=1, description="texts in a forward pass")
    replicas: int = Field(1, ge=1, description="Serve replicas")
    num_cpus: float = Field(0.1, ge=0, description="Ray CPUs of a replica")
    num_gpus: Gpus = Field(0.0, description="Ray GPUs of a replica")
    resources: CustomResources = Field({}, description="custom Ray resources of a replica: the nodes it may be on")
    perspective: PerspectiveConfig | None = Field(None, description="only kind: perspective")
    module: str = Field("toxicity", description="evaluate: the measurement, a hub id or a local script or its folder")
    trust_module: bool = Field(False, description="evaluate: run the code of a measurement from the hub")

    @model_validator(mode="before")
    @classmethod
    def _perspective_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "perspective":
            return {"model": "perspective-api", "label": "TOXICITY", "perspective": {}} | values
        return values

    @model_validator(mode="after")
    def _kind_has_its_settings(self) -> "ClassifierConfig":
        if (self.kind == "perspective") != (self.perspective is not None):
            raise ValueError(f"classifier {self.name!r}: kind={self.kind} does not go with perspective; remove one")
        if self.perspective is not None and self.label not in self.perspective.attributes:
            raise ValueError(
                f"classifier {self.name!r}: label={self.label!r} is not among the perspective.attributes "
                f"{', '.join(self.perspective.attributes)}; add it"
            )
        return self

    @model_validator(mode="after")
    def _label_is_not_read_the_wrong_way_round(self) -> "ClassifierConfig":
        if self.label_means == "toxic" and re.sub("[^a-z]", "", str(self.label).lower()) in CIVIL_LABELS:
            raise ValueError(
                f"classifier {self.name!r}: label={self.label} is what a civil text gets, and label_means=toxic would "
                "train away from it; set label_means=nontoxic (or name the label by its index, if it is toxic indeed)"
            )
        return self


def measurement_script(module: str) -> Path | None:
    """The local script of an `evaluate` measurement (a folder holds one of its own name); none: it is a hub id."""
    path = Path(module).expanduser().absolute()
    script = path if path.suffix == ".py" else path / f"{path.name}.py"
    return script if script.is_file() else None


def make_classifier_absolute(classifier: dict[str, Any]) -> None:
    """Paths that exist, absolute, in the tree of a classifier."""
    classifier["model"] = absolute_path(classifier["model"])
    if script := measurement_script(classifier["module"]):
        classifier["module"] = str(script)


def classifier_identity(classifier: ClassifierConfig) -> str:
    """Two classifiers with one identity are one model: `module:predict` and `module:predict_prob` are."""
    if classifier.perspective is not None:
        return f"{classifier.perspective.address} {classifier.label}"
    model = str(absolute_path(classifier.model))
    return model.partition(":")[0] if classifier.kind == "linear" else model
