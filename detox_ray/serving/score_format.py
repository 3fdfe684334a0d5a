"""`POST /v1/score`: our own format."""

from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from detox_ray.serving.api_config import ApiConfig, LimitsConfig
from detox_ray.serving.api_errors import ScoreError, documented, invalid
from detox_ray.serving.readings import TextReading, ensemble_scores, most_windows, overall_toxicity
from detox_ray.serving.text_scorer import TextScorer
from detox_ray.serving.texts import Span, joined

WINDOWS_HEADER = "X-Text-Windows"


class ScoreRequest(BaseModel):
    """One text or a list of texts, each with the prompt it answers, if that is to be read too."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    texts: list[str] | None = Field(None, min_length=1)
    prompt: str | None = Field(None, description="what `text` answers; the classifiers then read both")
    prompts: list[str] | None = Field(None, description="what each of `texts` answers")
    toxicity: bool = Field(False, description="also return each classifier's probability of toxicity")
    spans: bool = Field(False, description="also return the toxicity of each sentence")
    threshold: float | None = Field(None, ge=0, le=1, description="also return whether the toxicity reaches this")

    @model_validator(mode="after")
    def _one_form(self) -> "ScoreRequest":
        if (self.text is None) == (self.texts is None):
            raise ValueError("give either text or texts")
        if self.prompt is not None and self.text is None:
            raise ValueError("prompt goes with text; give prompts with texts")
        if self.prompts is not None and (self.texts is None or len(self.prompts) != len(self.texts)):
            raise ValueError("give as many prompts as texts")
        return self


class Verdict(BaseModel):
    """The TOXICITY of the service (without that attribute, the mean over the classifiers) against a threshold."""

    toxicity: float
    threshold: float
    toxic: bool


class SpanToxicity(BaseModel):
    """A sentence; `begin` and `end` (exclusive) count characters (Unicode code points) of the text."""

    begin: int
    end: int
    toxicity: float = Field(description="as in a verdict")
    per_classifier: dict[str, float]


class TextScore(BaseModel):
    """What the ensemble says of one text; a higher score is less toxic."""

    score: float
    per_classifier: dict[str, float]
    disagreement: float
    toxicity: dict[str, float] | None = Field(
        None, description="probability of toxicity by classifier, calibrated where the service is, when asked for"
    )
    verdict: Verdict | None = Field(None, description="when a threshold was given")
    spans: list[SpanToxicity] | None = Field(None, description="when asked for")
    windows: dict[str, int] | None = Field(
        None, description="for a text longer than a classifier reads at once: windows read, the most toxic one counts"
    )


class Model(BaseModel):
    """Which model a classifier is."""

    model: str
    revision: str


class ScoreResponse(BaseModel):
    """One result a text, in the order of the request."""

    results: list[TextScore]
    models: dict[str, Model]


def check_texts(texts: list[str], field: str, limits: LimitsConfig) -> None:
    """Raises ApiError when there are too many texts, or one is too long."""
    if len(texts) > limits.texts:
        raise invalid("too_many_texts", f"{len(texts)} texts; at most {limits.texts}", field, limits.texts)
    for i, text in enumerate(texts):
        if len(text) > limits.characters:
            where = field if len(texts) == 1 else f"{field}.{i}"
            message = f"{where} has {len(text)} characters; at most {limits.characters}"
            raise invalid("text_too_long", message, where, limits.characters)


def score_router(config: ApiConfig, scorer: TextScorer, models: dict[str, dict[str, str]]) -> APIRouter:
    """The route; `models` holds name and revision of each classifier's model."""
    router = APIRouter(tags=["score"], responses=documented(ScoreError))
    named = {name: Model(**model) for name, model in models.items()}

    @router.post("/v1/score", response_model_exclude_none=True, summary="Score texts")
    async def score(
        request: Annotated[ScoreRequest, Body(openapi_examples=EXAMPLES)], response: Response
    ) -> ScoreResponse:
        """Every classifier's score of each text, the ensemble's, and how far the classifiers disagree."""
        texts = request.texts if request.texts is not None else [request.text or ""]
        check_texts(texts, "text" if request.texts is None else "texts", config.limits)
        prompts = request.prompts or ([request.prompt] if request.prompt is not None else [])
        check_texts(prompts, "prompt" if request.prompts is None else "prompts", config.limits)
        read_as = [joined(p, t) for p, t in zip(prompts, texts, strict=True)] if prompts else texts
        whole, spans = await scorer.read_with_spans(read_as, texts, request.spans)
        response.headers[WINDOWS_HEADER] = str(most_windows(whole))
        scores = ensemble_scores(whole, config.reward)
        results = [
            TextScore(
                score=scores[i].reward,
                per_classifier=scores[i].per_classifier,
                disagreement=scores[i].disagreement,
                toxicity=reading.toxicity if request.toxicity else None,
                verdict=_verdict(reading, request.threshold, config),
                spans=[_span(span, part, config) for span, part in spans[i]] if request.spans else None,
                windows=reading.windows if max(reading.windows.values()) > 1 else None,
            )
            for i, reading in enumerate(whole)
        ]
        return ScoreResponse(results=results, models=named)

    return router


def _verdict(reading: TextReading, threshold: float | None, config: ApiConfig) -> Verdict | None:
    if threshold is None:
        return None
    toxicity = overall_toxicity(reading, config)
    return Verdict(toxicity=toxicity, threshold=threshold, toxic=toxicity >= threshold)


def _span(span: Span, reading: TextReading, config: ApiConfig) -> SpanToxicity:
    return SpanToxicity(
        begin=span[0],
        end=span[1],
        toxicity=overall_toxicity(reading, config),
        per_classifier=reading.toxicity,
    )


EXAMPLES: dict[str, Any] = {
    "one text": {"value": {"text": "you fool", "toxicity": True, "threshold": 0.5}},
    "a list": {"value": {"texts": ["what a lovely day", "you fool"]}},
    "a response to a prompt": {
        "value": {"prompt": "What do you think of me?", "text": "You are a fool.", "spans": True}
    },
}
