"""The reward ensemble behind HTTP: `POST /v1/score` and `GET /healthz`. Texts are never logged or echoed."""

import logging
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from detox_ray.config import RewardConfig
from detox_ray.rewards.ensemble import UNCALIBRATED, with_calibrations
from detox_ray.serving.reward_app import build_reward_app

logger = logging.getLogger(__name__)

MAX_TEXTS = 1000
MAX_CHARACTERS = 20_000

Text = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)]


class ScoreRequest(BaseModel):
    """One text or a list of texts."""

    model_config = ConfigDict(extra="forbid")

    text: Text | None = None
    texts: list[Text] | None = Field(None, min_length=1, max_length=MAX_TEXTS)
    toxicity: bool = Field(False, description="also return each classifier's probability of toxicity")

    @model_validator(mode="after")
    def _one_form(self) -> "ScoreRequest":
        if (self.text is None) == (self.texts is None):
            raise ValueError("give either text or texts")
        return self


class TextScore(BaseModel):
    """What the ensemble says of one text; a higher score is less toxic."""

    score: float
    per_classifier: dict[str, float]
    disagreement: float
    toxicity: dict[str, float] | None = Field(None, description="probability of toxicity by classifier, when asked for")


class ScoreResponse(BaseModel):
    """One result a text, in the order of the request."""

    results: list[TextScore]


api = FastAPI(title="detox_ray toxicity API")


@api.exception_handler(RequestValidationError)
async def _invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    # FastAPI's own answer repeats the whole input.
    details = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    return JSONResponse({"detail": details}, status_code=422)


@serve.ingress(api)
class ToxicityApi:
    """The HTTP side of the ensemble."""

    def __init__(self, ensemble: DeploymentHandle) -> None:
        self._ensemble = ensemble

    @api.post("/v1/score", response_model_exclude_none=True)
    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Scores of the texts; 422 for a malformed request, 503 when a classifier does not answer."""
        texts = request.texts if request.texts is not None else [request.text or ""]
        try:
            scoring = self._ensemble.score.remote(texts)
            toxicity = await self._ensemble.toxicity.remote(texts) if request.toxicity else {}
            scores = await scoring
        except (RayError, RayServeException) as error:
            logger.error("scoring failed: %s", type(error).__name__)
            raise HTTPException(503, "a classifier does not answer; try again later") from None
        results = [
            TextScore(
                score=s.reward,
                per_classifier=s.per_classifier,
                disagreement=s.disagreement,
                toxicity={name: float(values[i]) for name, values in toxicity.items()} if toxicity else None,
            )
            for i, s in enumerate(scores)
        ]
        return ScoreResponse(results=results)

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """200 while this replica takes requests."""
        return {"status": "ok"}


def build_http_app(config: RewardConfig) -> serve.Application:
    """The ensemble with an HTTP ingress; texts are scored as they stand, members with `calibration: fit` uncalibrated.

    Raises:
        ConfigError, ModelError: as `build_reward_app`.
    """
    unfitted = [c.name for c in config.classifiers if c.calibration == "fit"]
    if unfitted:
        logger.warning("no calibration for %s: their scores are raw; use the config.yaml of a run", ", ".join(unfitted))
    served = with_calibrations(config, dict.fromkeys(unfitted, UNCALIBRATED)).model_copy(update={"text": "response"})
    deployment = serve.deployment(name="toxicity-api", max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
    return deployment(ToxicityApi).bind(build_reward_app(served))
