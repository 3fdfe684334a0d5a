"""`GET /docs`: the OpenAPI schema as a page that needs nothing from elsewhere, so that it also works offline."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Template

METHODS = ("get", "post")


def docs_page(schema: dict[str, Any], base_url: str) -> str:
    """HTML with every operation of an OpenAPI schema, the fields of its body and its examples for curl."""
    template = Template(Path(__file__).with_name("docs.html.jinja").read_text(encoding="utf-8"), autoescape=True)
    operations = [
        _operation(schema, method, path, operation)
        for path, by_method in schema["paths"].items()
        for method, operation in by_method.items()
        if method in METHODS
    ]
    info = schema["info"]
    return template.render(
        title=info["title"], description=info["description"], operations=operations, base_url=base_url.rstrip("/")
    )


def _operation(schema: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> dict[str, Any]:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    reference = body.get("schema", {}).get("$ref", "").rpartition("/")[2]
    properties = schema.get("components", {}).get("schemas", {}).get(reference, {}).get("properties", {})
    return {
        "method": method.upper(),
        "path": path,
        "summary": operation.get("summary", ""),
        "description": operation.get("description", ""),
        "fields": [
            {"name": name, "type": _type(field), "description": field.get("description", "")}
            for name, field in properties.items()
        ],
        "examples": [(name, json.dumps(example["value"])) for name, example in body.get("examples", {}).items()],
    }


def _type(field: dict[str, Any]) -> str:
    """A property's type in words."""
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"] if option.get("type") != "null")
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    return field.get("type") or " or ".join(_type(option) for option in field.get("oneOf", []))
