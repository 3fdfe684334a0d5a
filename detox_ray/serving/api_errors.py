"""A refused request, and how each API says so: ours, Perspective's (Google's error model) and OpenAI's."""

import math
import re
from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic_core import ErrorDetails

Api = Literal["score", "perspective", "moderations"]

# By HTTP status, as Google's APIs map them.
GOOGLE_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
OPENAI_TYPE = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Perspective's ErrorType, where it has one of its own.
PERSPECTIVE_TYPE = {
    "comment_empty": "COMMENT_EMPTY",
    "text_too_long": "COMMENT_TOO_LONG",
    "no_requested_attributes": "NO_REQUESTED_ATTRIBUTES",
    "language_not_supported": "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE",
}
VALIDATION_CODES = {
    "missing": "missing_field",
    "extra_forbidden": "unknown_field",
    "json_invalid": "invalid_json",
}
LONGEST_FIELD = 200
TYPE_TRIED = re.compile(r"(str|list\[.*\])$")


class Refusal(BaseModel):
    """Why a request was refused."""

    code: str
    message: str
    field: str | None
    limit: float | str | None


class ScoreError(BaseModel):
    """An error of /v1/score and of the operational paths."""

    error: Refusal
    detail: str


class OpenAIRefusal(BaseModel):
    """OpenAI's error object, and the limit."""

    message: str
    type: str
    param: str | None
    code: str
    limit: float | str | None


class OpenAIError(BaseModel):
    """An error of /v1/moderations."""

    error: OpenAIRefusal


class GoogleStatus(BaseModel):
    """Google's error model; an ErrorInfo detail holds the reason, and field and limit as metadata."""

    code: int
    message: str
    status: str
    details: list[dict[str, Any]]


class GoogleError(BaseModel):
    """An error of the Perspective format."""

    error: GoogleStatus


class ApiError(Exception):
    """A request that is refused or cannot be answered; nothing in it quotes the request's texts."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        limit: float | str | None = None,
        retry_after_s: float | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        """`detail` is added to Perspective's own error detail."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.field = field
        self.limit = limit
        self.retry_after_s = retry_after_s
        self.detail = detail or {}


def invalid(code: str, message: str, field: str | None = None, limit: float | str | None = None) -> ApiError:
    """A request whose content is not acceptable: 422 in our API, 400 in the others."""
    return ApiError(422, code, message, field=field, limit=limit)


def from_validation(error: ErrorDetails) -> ApiError:
    """The first thing pydantic found wrong; its message is kept, the input it quotes is not."""
    parts = [str(part) for part in error["loc"] if part != "body"]
    # In a union pydantic also names the type it tried.
    field = ".".join(part for part in parts if not TYPE_TRIED.match(part))[:LONGEST_FIELD] or "body"
    message = error["msg"].removeprefix("Value error, ")
    return invalid(VALIDATION_CODES.get(error["type"], "invalid_field"), f"{field}: {message}", field)


def documented(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of routes whose errors are `model`."""
    return {"default": {"model": model, "description": "Refused, or not answered; 429 and 503 come with Retry-After"}}


def api_of(path: str) -> Api:
    """The API a path belongs to, whose format its errors have."""
    if path.startswith(("/v1alpha1/", "/$discovery/")):
        return "perspective"
    return "moderations" if path.startswith("/v1/moderations") else "score"


def error_response(error: ApiError, api: Api) -> JSONResponse:
    """The error in the format of `api`."""
    status = 400 if error.status == 422 and api != "score" else error.status
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body: dict[str, Any] = {
        "error": {"score": _ours, "perspective": _google, "moderations": _openai}[api](error, status)
    }
    if api == "score":
        # Where FastAPI's clients look.
        body["detail"] = error.message
    return JSONResponse(body, status_code=status, headers=headers)


def _ours(error: ApiError, status: int) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "field": error.field, "limit": error.limit}


def _openai(error: ApiError, status: int) -> dict[str, Any]:
    fallback = "invalid_request_error" if status < 500 else "server_error"
    return {
        "message": error.message,
        "type": OPENAI_TYPE.get(status, fallback),
        "param": error.field,
        "code": error.code,
        "limit": error.limit,
    }


def _google(error: ApiError, status: int) -> dict[str, Any]:
    details: list[dict[str, Any]] = []
    if status == 400 and error.code != "api_key_invalid":
        kind = PERSPECTIVE_TYPE.get(error.code, "INVALID_REQUEST")
        details.append(
            {"@type": "type.googleapis.com/google.commentanalyzer.v1alpha1.Error", "errorType": kind, **error.detail}
        )
    metadata = {
        name: str(value) for name, value in (("field", error.field), ("limit", error.limit)) if value is not None
    }
    details.append(
        {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": error.code.upper(),
            "domain": "detox_ray",
            "metadata": metadata,
        }
    )
    if error.retry_after_s is not None:
        details.append(
            {
                "@type": "type.googleapis.com/google.rpc.RetryInfo",
                "retryDelay": f"{max(1, math.ceil(error.retry_after_s))}s",
            }
        )
    return {
        "code": status,
        "message": error.message,
        "status": GOOGLE_STATUS.get(status, "UNKNOWN"),
        "details": details,
    }
