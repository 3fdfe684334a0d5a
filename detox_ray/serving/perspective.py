"""`POST /v1alpha1/comments:analyze` and `:suggestscore`, in the formats Perspective API publishes."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.alias_generators import to_camel

from detox_ray.serving.api_config import ApiConfig, AttributeSource, LimitsConfig
from detox_ray.serving.api_errors import ApiError, GoogleError, documented, invalid
from detox_ray.serving.api_metrics import ApiMetrics
from detox_ray.serving.discovery import discovery_document
from detox_ray.serving.readings import TextReading, attribute_probability, most_windows
from detox_ray.serving.score_format import WINDOWS_HEADER
from detox_ray.serving.text_scorer import TextScorer
from detox_ray.serving.texts import Span, utf16_offsets

PLAIN_TEXT = ("PLAIN_TEXT", "TEXT_TYPE_UNSPECIFIED")
PROBABILITY = ("PROBABILITY", "SCORE_TYPE_UNSPECIFIED")
DEFAULT_LANGUAGES = ["en"]


class Message(BaseModel):
    """As JSON for protocol buffers: names in camel case, and in snake case as well."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=True)

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any, info: ValidationInfo) -> Any:
        return cls.model_fields[info.field_name or ""].get_default() if value is None else value


class TextEntry(Message):
    """A text and its type."""

    text: str = ""
    type: str = "PLAIN_TEXT"


class ArticleAndParentComment(Message):
    """What a comment was written under."""

    article: TextEntry | None = None
    parent_comment: TextEntry | None = None


class Context(Message):
    """What a comment answers; accepted and, as Perspective does, not read."""

    entries: list[TextEntry] | None = None
    article_and_parent_comment: ArticleAndParentComment | None = None


class AttributeParameters(Message):
    """How an attribute is wanted."""

    score_type: str = "PROBABILITY"
    score_threshold: float | None = Field(None, allow_inf_nan=False, description="lower scores are not returned")


class AnalyzeCommentRequest(Message):
    """A comment and what to score it for."""

    comment: TextEntry = TextEntry()
    context: Context | None = None
    requested_attributes: dict[str, AttributeParameters | None] = {}
    span_annotations: bool = Field(False, description="score every sentence as well")
    languages: list[str] = []
    do_not_store: bool = Field(False, description="the scores are not kept in the cache; texts never are")
    client_token: str | None = None
    session_id: str | None = None
    community_id: str | None = None


class Score(Message):
    """A probability."""

    value: float | None = Field(None, ge=0, le=1)
    type: str = "PROBABILITY"


class SpanScore(Message):
    """The score of a part of the comment; `begin` and `end` (exclusive) count UTF-16 code units."""

    begin: int | None = Field(None, ge=0)
    end: int | None = Field(None, ge=0)
    score: Score | None = None


class AttributeScores(Message):
    """The scores of one attribute."""

    summary_score: Score | None = None
    span_scores: list[SpanScore] | None = None


class SuggestCommentScoreRequest(Message):
    """A comment and the scores it should have had."""

    comment: TextEntry = TextEntry()
    context: Context | None = None
    attribute_scores: dict[str, AttributeScores] = {}
    languages: list[str] = []
    community_id: str | None = None
    client_token: str | None = None
    session_id: str | None = None


def perspective_router(config: ApiConfig, scorer: TextScorer, metrics: ApiMetrics) -> APIRouter:
    """The two methods, and the discovery document that Google's clients build themselves from."""
    router = APIRouter(tags=["perspective"], responses=documented(GoogleError))

    @router.post("/v1alpha1/comments:analyze", summary="Perspective's AnalyzeComment")
    async def analyze(
        request: Annotated[AnalyzeCommentRequest, Body(openapi_examples=ANALYZE_EXAMPLES)],
    ) -> Response:
        """Scores of the requested attributes; one this service does not have is refused."""
        _check_comment(request.comment, request.context, config.limits)
        if not request.requested_attributes:
            raise invalid("no_requested_attributes", "Missing requested_attributes", "requestedAttributes")
        languages = request.languages or DEFAULT_LANGUAGES
        for name, parameters in request.requested_attributes.items():
            _check_attribute(name, parameters or AttributeParameters(), languages, config)
        text = request.comment.text
        [whole], [spans] = await scorer.read_with_spans(
            [text], [text], request.span_annotations, remember=not request.do_not_store
        )
        # Without annotations there is one span, the whole comment.
        parts = spans or [((0, len(text)), whole)]
        ranges = utf16_offsets(text, [span for span, _ in parts])
        scores = {
            name: attribute
            for name, parameters in request.requested_attributes.items()
            if (attribute := _attribute(name, config, parameters, whole, ranges, parts))
        }
        body: dict[str, Any] = {"attributeScores": scores} if scores else {}
        body |= {"languages": languages} | _echo(request)
        return JSONResponse(body, headers={WINDOWS_HEADER: str(most_windows([whole]))})

    @router.post("/v1alpha1/comments:suggestscore", summary="Perspective's SuggestCommentScore")
    async def suggest_score(
        request: Annotated[SuggestCommentScoreRequest, Body(openapi_examples=SUGGEST_EXAMPLES)],
    ) -> Response:
        """Checks the suggestion and counts it; nothing of it is stored, and nothing learns from it."""
        _check_comment(request.comment, request.context, config.limits)
        if not request.attribute_scores:
            raise invalid("missing_field", "attribute_scores must not be empty", "attributeScores")
        for name, scores in request.attribute_scores.items():
            _check_suggestion(name, scores, config)
        metrics.suggestions.inc()
        return JSONResponse({"requestedLanguages": request.languages} | _echo(request))

    @router.get("/$discovery/rest", summary="Google API discovery document")
    async def discovery(request: Request) -> Response:
        """What `googleapiclient.discovery.build` reads."""
        return JSONResponse(discovery_document(config.http.public_url or str(request.base_url)))

    return router


def _check_comment(comment: TextEntry, context: Context | None, limits: LimitsConfig) -> None:
    if not comment.text:
        raise invalid("comment_empty", "Comment must be non-empty.", "comment.text")
    if len(comment.text) > limits.characters:
        message = f"Comment text too long. It has {len(comment.text)} characters; at most {limits.characters}."
        raise invalid("text_too_long", message, "comment.text", limits.characters)
    if comment.type not in PLAIN_TEXT:
        message = (
            "Currently, only 'PLAIN_TEXT' comments are supported" if comment.type == "HTML" else "Unknown text type"
        )
        raise invalid("unsupported_text_type", message, "comment.type", "PLAIN_TEXT")
    if context is not None and context.entries and context.article_and_parent_comment:
        message = "Context can have either entries or article_and_parent_comment, but both fields were populated."
        raise invalid("invalid_context", message, "context")


def _check_attribute(name: str, parameters: AttributeParameters, languages: list[str], config: ApiConfig) -> None:
    field = f"requestedAttributes.{name[:100]}"
    source = _known_attribute(name, field, config)
    if parameters.score_type not in PROBABILITY:
        message = f"Requested score type {parameters.score_type[:100]} is not supported by attribute {name}"
        raise invalid("unsupported_score_type", message, f"{field}.scoreType", "PROBABILITY")
    supported = {language.lower() for language in source.languages}
    # `en-GB` is English.
    refused = [lang for lang in languages if not {lang.lower(), lang.lower().partition("-")[0]} & supported]
    if refused:
        shown = [language[:35] for language in refused[:20]]
        raise ApiError(
            422,
            "language_not_supported",
            f"Attribute {name} does not support request languages: {', '.join(shown)[:200]}",
            field="languages",
            limit=", ".join(source.languages),
            detail={"languageNotSupportedByAttributeError": {"attribute": name, "requestedLanguages": shown}},
        )


def _check_suggestion(name: str, scores: AttributeScores, config: ApiConfig) -> None:
    field = f"attributeScores.{name[:100]}"
    _known_attribute(name, field, config)
    spans = scores.span_scores or []
    given = [scores.summary_score] if scores.summary_score is not None else []
    given += [span.score for span in spans if span.score is not None]
    if not given or any(score.value is None or score.type not in PROBABILITY for score in given):
        raise invalid("invalid_field", f"{field} needs a summaryScore or spanScores with a probability each", field)
    if any(span.score is None or span.begin is None or span.end is None or span.begin >= span.end for span in spans):
        raise invalid("invalid_field", f"every span of {field} needs begin < end and a score", f"{field}.spanScores")


def _known_attribute(name: str, field: str, config: ApiConfig) -> AttributeSource:
    if name not in config.attributes:
        message = f"Unknown requested attribute: {name[:100]}"
        raise invalid("unknown_attribute", message, field, ", ".join(config.attributes))
    return config.attributes[name]


def _attribute(
    name: str,
    config: ApiConfig,
    parameters: AttributeParameters | None,
    whole: TextReading,
    ranges: list[Span],
    parts: list[tuple[Span, TextReading]],
) -> dict[str, Any] | None:
    """The scores of an attribute, or none when the summary is below the threshold asked for."""
    summary = attribute_probability(whole, name, config)
    threshold = parameters.score_threshold if parameters is not None else None
    if threshold is not None and summary < threshold:
        return None
    return {
        "spanScores": [
            {"begin": begin, "end": end, "score": _score(attribute_probability(reading, name, config))}
            for (begin, end), (_, reading) in zip(ranges, parts, strict=True)
        ],
        "summaryScore": _score(summary),
    }


def _score(value: float) -> dict[str, Any]:
    return {"value": value, "type": "PROBABILITY"}


def _echo(request: AnalyzeCommentRequest | SuggestCommentScoreRequest) -> dict[str, str]:
    tokens = {"clientToken": request.client_token, "sessionId": request.session_id}
    return {name: token for name, token in tokens.items() if token is not None}


ANALYZE_EXAMPLES: dict[str, Any] = {
    "one attribute": {"value": {"comment": {"text": "you fool"}, "requestedAttributes": {"TOXICITY": {}}}},
    "sentences": {
        "value": {
            "comment": {"text": "What a lovely day. You are a fool."},
            "requestedAttributes": {"TOXICITY": {"scoreThreshold": 0.3}},
            "spanAnnotations": True,
            "languages": ["en"],
            "doNotStore": True,
        }
    },
}
SUGGEST_EXAMPLES: dict[str, Any] = {
    "a correction": {
        "value": {
            "comment": {"text": "what a lovely day"},
            "attributeScores": {"TOXICITY": {"summaryScore": {"value": 0}}},
        }
    }
}
