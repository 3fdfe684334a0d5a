"""The discovery document of the Perspective format: what Google's API clients build their methods from."""

from typing import Any

SCORE_TYPES = ["SCORE_TYPE_UNSPECIFIED", "PROBABILITY"]


def discovery_document(root_url: str) -> dict[str, Any]:
    """The document of the service at `root_url` (`http://host:port/`)."""
    return {
        "kind": "discovery#restDescription",
        "discoveryVersion": "v1",
        "id": "commentanalyzer:v1alpha1",
        "name": "commentanalyzer",
        "version": "v1alpha1",
        "version_module": True,
        "title": "Comment analyzer in Perspective's format, by detox_ray",
        "description": "Scores comments for the attributes this service is configured to have.",
        "protocol": "rest",
        "rootUrl": root_url.rstrip("/") + "/",
        "baseUrl": root_url.rstrip("/") + "/",
        "servicePath": "",
        "basePath": "",
        "batchPath": "batch",
        "parameters": {
            "key": _parameter("API key, where the service has keys."),
            "alt": _parameter("Data format for response.") | {"default": "json", "enum": ["json"]},
            "fields": _parameter("Accepted and not applied: whole responses are returned."),
            "prettyPrint": {"type": "boolean", "location": "query", "default": "true"},
            "quotaUser": _parameter("Accepted and not used."),
        },
        "schemas": _schemas(),
        "resources": {
            "comments": {
                "methods": {
                    "analyze": _method("analyze", "AnalyzeComment", "Scores a comment for the requested attributes."),
                    "suggestscore": _method(
                        "suggestscore", "SuggestCommentScore", "Checks and counts a suggested score; stores nothing."
                    ),
                }
            }
        },
    }


def _method(name: str, message: str, description: str) -> dict[str, Any]:
    return {
        "id": f"commentanalyzer.comments.{name}",
        "path": f"v1alpha1/comments:{name}",
        "flatPath": f"v1alpha1/comments:{name}",
        "httpMethod": "POST",
        "description": description,
        "parameters": {},
        "parameterOrder": [],
        "request": {"$ref": f"{message}Request"},
        "response": {"$ref": f"{message}Response"},
    }


def _schemas() -> dict[str, Any]:
    return {
        "TextEntry": _object("TextEntry", text=_STRING, type=_STRING | {"enum": ["PLAIN_TEXT", "HTML"]}),
        "ArticleAndParentComment": _object(
            "ArticleAndParentComment", article=_ref("TextEntry"), parentComment=_ref("TextEntry")
        ),
        "Context": _object(
            "Context",
            entries=_array(_ref("TextEntry")),
            articleAndParentComment=_ref("ArticleAndParentComment"),
        ),
        "AttributeParameters": _object(
            "AttributeParameters", scoreType=_STRING | {"enum": SCORE_TYPES}, scoreThreshold=_FLOAT
        ),
        "Score": _object("Score", value=_FLOAT, type=_STRING | {"enum": SCORE_TYPES}),
        "SpanScore": _object("SpanScore", begin=_INTEGER, end=_INTEGER, score=_ref("Score")),
        "AttributeScores": _object("AttributeScores", summaryScore=_ref("Score"), spanScores=_array(_ref("SpanScore"))),
        "AnalyzeCommentRequest": _object(
            "AnalyzeCommentRequest",
            comment=_ref("TextEntry"),
            context=_ref("Context"),
            requestedAttributes=_map(_ref("AttributeParameters")),
            spanAnnotations=_BOOLEAN,
            languages=_array(_STRING),
            doNotStore=_BOOLEAN,
            clientToken=_STRING,
            sessionId=_STRING,
            communityId=_STRING,
        ),
        "AnalyzeCommentResponse": _object(
            "AnalyzeCommentResponse",
            attributeScores=_map(_ref("AttributeScores")),
            languages=_array(_STRING),
            clientToken=_STRING,
            sessionId=_STRING,
        ),
        "SuggestCommentScoreRequest": _object(
            "SuggestCommentScoreRequest",
            comment=_ref("TextEntry"),
            context=_ref("Context"),
            attributeScores=_map(_ref("AttributeScores")),
            languages=_array(_STRING),
            communityId=_STRING,
            clientToken=_STRING,
            sessionId=_STRING,
        ),
        "SuggestCommentScoreResponse": _object(
            "SuggestCommentScoreResponse",
            requestedLanguages=_array(_STRING),
            clientToken=_STRING,
            sessionId=_STRING,
        ),
    }


_STRING = {"type": "string"}
_BOOLEAN = {"type": "boolean"}
_FLOAT = {"type": "number", "format": "float"}
_INTEGER = {"type": "integer", "format": "int32"}


def _object(name: str, **properties: Any) -> dict[str, Any]:
    return {"id": name, "type": "object", "properties": properties}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": name}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _map(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


def _parameter(description: str) -> dict[str, Any]:
    return {"type": "string", "location": "query", "description": description}
