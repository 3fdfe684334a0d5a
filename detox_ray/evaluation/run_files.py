"""What was run, from the files a training run leaves in its folder; each may be missing."""

import json
import logging
from pathlib import Path
from typing import Any

import yaml

from detox_ray.errors import DataError
from detox_ray.evaluation.evaluation_file import Evaluation, splits, systems
from detox_ray.evaluation.metric_format import split_label
from detox_ray.evaluation.responses import WORDS

ANALYSIS_FORMAT = 1

logger = logging.getLogger(__name__)


def section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of the configuration; empty where it is missing."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def prompt_sources(config: dict[str, Any]) -> list[str]:
    """Names of the sources of the training prompts."""
    data = section(config, "data")
    mixed_in = [part.get("source") for part in data.get("mixed_in") or [] if isinstance(part, dict)]
    return [published_name(source) for source in (data.get("source"), *mixed_in) if source]


def reward_classifiers(config: dict[str, Any]) -> list[str]:
    """Names of the classifiers in the reward."""
    members = section(config, "reward").get("classifiers") or []
    return [str(member.get("name")) for member in members if isinstance(member, dict)]


def published_name(source: Any) -> str:
    """A model or data set as it may be published: of a path on this machine its last part, a hub id as it is."""
    path = Path(str(source))
    return path.name if path.is_absolute() else str(source)


def facts(config: dict[str, Any], evaluation: Evaluation) -> list[tuple[str, str]]:
    """What was run, in a few lines; what the files do not say is left out."""
    policy, rollout, train = (section(config, name) for name in ("policy", "rollout", "train"))
    counts = ", ".join(
        f"{split_label(name)} {count}" for name, count in splits(evaluation).items() if count is not None
    )
    members, judge = reward_classifiers(config), evaluation.get("judge")
    rows = {
        "Policy": published_name(policy.get("model") or ""),
        "Quantisation": policy.get("quantization"),
        "Reward": ", ".join(members),
        "Judge, not in the reward" if members and judge not in members else "Judge": judge,
        "Scorers": ", ".join(evaluation.get("scorers") or []),
        "Systems": ", ".join(systems(evaluation)),
        "Reference": evaluation["reference"],
        "Training prompts": ", ".join(prompt_sources(config)),
        "Prompts judged": counts,
        "Responses per prompt": evaluation.get("samples_per_prompt"),
        "Longest response, tokens": (evaluation.get("sampling") or rollout).get("max_new_tokens"),
        "Counted in (lengths, diversity)": _unit(evaluation.get("counted_in")),
        "Perplexity under": published_name(evaluation.get("perplexity_model") or ""),
        "Relevance by": published_name(evaluation.get("relevance_model") or ""),
        "Training steps": evaluation.get("steps", train.get("total_steps")),
        "Seed": evaluation.get("seed"),
    }
    return [(name, str(found)) for name, found in rows.items() if found not in (None, "")]


def _unit(counted_in: str | None) -> str:
    """What the responses were counted in, in words; nothing where it is not known."""
    return f"tokens of {published_name(counted_in)}" if counted_in not in (None, WORDS) else counted_in or ""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file by step; of a step that a resumed run did again, the later line."""
    by_step: dict[Any, dict[str, Any]] = {}
    unreadable = 0
    for text in read_text(path).splitlines():
        try:
            line = json.loads(text)
            by_step[int(line["step"])] = line
        except (ValueError, KeyError, TypeError):
            unreadable += bool(text.strip())
    if unreadable:
        logger.warning("%s: %d lines are not metrics of a step and are not in the report", path, unreadable)
    return [by_step[step] for step in sorted(by_step)]


def read_analysis(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's analysis.json; None where there is none.

    Raises:
        DataError: it is not an analysis of a format that this version shows.
    """
    path = folder / "analysis.json"
    if not path.exists():
        return None
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): analyse again, or remove it") from error
    if not isinstance(content, dict) or content.get("format") != ANALYSIS_FORMAT:
        raise DataError(f"{path} is not an analysis of format {ANALYSIS_FORMAT}: analyse again, or remove it")
    return content


def read_text(path: Path) -> str:
    """The content of a file; empty where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def parse_config_text(config_text: str) -> dict[str, Any]:
    """The report shows the configuration of another version of the package as well, so it is not validated."""
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}
