"""Where a run's metrics go besides its own folder."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from detox_ray.config_section import Section


def _absolute(uri: str) -> str:
    return uri if "://" in uri or uri.startswith("databricks") else str(Path(uri).expanduser().absolute())


class WandbConfig(Section):
    """A run on Weights & Biases; the key is read from WANDB_API_KEY or `wandb login`, as theirs is."""

    project: str = Field("detox_ray", min_length=1, description="that the run is put in")
    entity: str | None = Field(None, description="user or team; none: the key's own")
    mode: Literal["online", "offline"] = Field("online", description="offline: files in RUN/wandb, for `wandb sync`")


class MlflowConfig(Section):
    """A run on an MLflow server."""

    uri: Annotated[str, AfterValidator(_absolute)] = Field(
        description="tracking URI, such as https://mlflow.example.org; a folder needs MLFLOW_ALLOW_FILE_STORE=true"
    )
    experiment: str = Field("detox_ray", min_length=1, description="that the run is put in")


class TrackingConfig(Section):
    """TensorBoard's files are always written, and Ray's Prometheus endpoint always has the last step."""

    wandb: WandbConfig | None = Field(None, description="metrics also go to Weights & Biases")
    mlflow: MlflowConfig | None = Field(None, description="metrics also go to an MLflow server")
