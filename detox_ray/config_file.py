"""From a YAML file and dotted overrides to a typed configuration, and back; mistakes are explained in one line."""

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from detox_ray.config import Config
from detox_ray.config_section import S, Section
from detox_ray.errors import ConfigError

Overrides = list[str] | tuple[str, ...]


def load_config(path: str | Path, overrides: Overrides = ()) -> Config:
    """The configuration in a YAML file with dotted overrides (`ppo.learning_rate=1e-4`) applied; values are YAML.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is out of bounds.
    """
    return parse_section(Config, read_tree(path, overrides))


def read_tree(source: str | Path | dict[str, Any], overrides: Overrides = ()) -> dict[str, Any]:
    """The tree of dicts, lists and values in a YAML file, or the given one, with dotted overrides applied.

    Raises:
        ConfigError: the file cannot be read, or an override names no part of the tree.
    """
    tree = source if isinstance(source, dict) else _read_yaml(Path(source))
    for override in overrides:
        _apply_override(tree, override)
    return tree


class _Loader(yaml.SafeLoader):
    """YAML 1.1's safe types without dates: a name such as 2024-01-31 is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(
            f"config {path}: {error.strerror}; give the path of a YAML file, such as configs/laptop.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} holds no settings: expected `key: value` lines, such as `name: run`")
    return tree


def parse_config(tree: dict[str, Any]) -> Config:
    """The configuration of a run in a plain tree; errors as `load_config`."""
    return parse_section(Config, tree)


def parse_section(section: type[S], tree: dict[str, Any]) -> S:
    """A plain tree of dicts, lists and values as a configuration of the given kind.

    Raises:
        ConfigError: a key is unknown, or a value is out of bounds.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, section) for e in error.errors()[:3])) from None


def dump_config(config: Section) -> str:
    """The resolved tree as YAML, which reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, such as ppo.learning_rate=1e-4")
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, dict):
            node = node.setdefault(parent, {})
        elif isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        else:
            raise ConfigError(f"override {override!r}: {parent!r} does not name a part of the configuration")
    if isinstance(node, dict):
        node[last] = _parse_value(text)
    elif isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = _parse_value(text)
    else:
        raise ConfigError(f"override {override!r}: {last!r} does not name a part of the configuration")


def _parse_value(text: str) -> Any:
    """YAML where it is a number, a list, `{key: value}` or quoted; `Summarize: {prompt}` or `#1 ` is the text it is."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    # YAML 1.1 reads 1e-4 as text.
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,3}", value):
        return float(value)
    is_plain_text = isinstance(value, str) and text.lstrip()[0] not in "\"'"
    is_comment = value is None and text.lstrip().startswith("#")
    is_block = isinstance(value, dict | list) and text.lstrip()[0] not in "{["
    is_placeholder = isinstance(value, dict) and value and all(v is None for v in value.values())
    return text if is_plain_text or is_comment or is_block or is_placeholder else value


def _explain(error: Any, section: type[BaseModel]) -> str:
    """One pydantic error as `key = value: what is wrong`, with the nearest valid key for an unknown one."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _keys_at(section, error["loc"][:-1])
        nearest = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.55)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys: {', '.join(known)}"
        return f"unknown key {location!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{location} is missing: {message}"
    if not location or error["type"] == "value_error":
        return message
    return f"{location} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_at(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The valid keys of the section a location leads to."""
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for a in get_args(annotation) if (s := _section_of(a))), None)
