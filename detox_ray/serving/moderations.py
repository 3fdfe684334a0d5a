"""`POST /v1/moderations` in OpenAI's format."""

import uuid
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Body
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from detox_ray.serving.api_config import ApiConfig, Category
from detox_ray.serving.api_errors import OpenAIError, documented, invalid
from detox_ray.serving.readings import TextReading, category_probability, most_windows
from detox_ray.serving.score_format import WINDOWS_HEADER, check_texts
from detox_ray.serving.text_scorer import TextScorer

CATEGORIES: tuple[Category, ...] = get_args(Category)
UNSCORED_HEADER = "X-Unscored-Categories"
MODEL = "detox_ray"


class TextPart(BaseModel):
    """A text of a multi-modal input."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """An image of a multi-modal input, which this service cannot judge and refuses."""

    type: Literal["image_url"]
    image_url: Any = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ModerationRequest(BaseModel):
    """Texts to classify."""

    model_config = ConfigDict(extra="forbid")

    input: str | list[str] | list[Part] = Field(
        description="a text; a list of texts, with a result each; or parts of one message, with one result"
    )
    model: str | None = Field(None, description="accepted and not used: the answer names the model that answered")


def moderations_router(config: ApiConfig, scorer: TextScorer) -> APIRouter:
    """The route."""
    router = APIRouter(tags=["moderations"], responses=documented(OpenAIError))
    unscored = [category for category in CATEGORIES if category not in config.categories]
    names = "+".join(c.name for c in config.reward.classifiers)

    @router.post("/v1/moderations", summary="OpenAI's moderations")
    async def moderations(request: Annotated[ModerationRequest, Body(openapi_examples=EXAMPLES)]) -> Response:
        """Probabilities by category.

        A category this service does not have is never flagged, scores 0, and `category_applied_input_types` is empty
        for it: no input was judged. `unscored_categories` and the header X-Unscored-Categories list them.
        """
        groups = _groups(request.input)
        texts = [text for group in groups for text in group]
        check_texts(texts, "input", config.limits)
        readings = await scorer.read(texts)
        results, start = [], 0
        for group in groups:
            results.append(_result(readings[start : start + len(group)], config))
            start += len(group)
        body = {
            "id": f"modr-{uuid.uuid4().hex}",
            "model": f"{MODEL}:{names}",
            "results": results,
            "unscored_categories": unscored,
        }
        headers = {WINDOWS_HEADER: str(most_windows(readings)), UNSCORED_HEADER: ",".join(unscored)}
        return JSONResponse(body, headers=headers)

    return router


def _groups(given: str | list[str] | list[TextPart | ImagePart]) -> list[list[str]]:
    """The texts of each result."""
    if isinstance(given, str):
        return [[given]]
    if not given:
        raise invalid("missing_field", "input is empty: give a text or a list of texts", "input")
    parts = []
    groups = []
    for i, item in enumerate(given):
        if isinstance(item, str):
            groups.append([item])
        elif isinstance(item, TextPart):
            parts.append(item.text)
        else:
            raise invalid("unsupported_input_type", "this service judges texts, not images", f"input.{i}", "text")
    return groups or [parts]


def _result(readings: list[TextReading], config: ApiConfig) -> dict[str, Any]:
    """One result; of several parts the one with the highest probability counts."""
    sources = config.categories
    scores = {
        category: max(category_probability(reading, category, config) for reading in readings)
        if category in sources
        else 0.0
        for category in CATEGORIES
    }
    flags = {
        category: category in sources and scores[category] >= sources[category].threshold for category in CATEGORIES
    }
    return {
        "flagged": any(flags.values()),
        "categories": flags,
        "category_scores": scores,
        "category_applied_input_types": {category: ["text"] if category in sources else [] for category in CATEGORIES},
    }


EXAMPLES: dict[str, Any] = {
    "one text": {"value": {"input": "you fool", "model": "omni-moderation-latest"}},
    "a list": {"value": {"input": ["what a lovely day", "you fool"]}},
}
