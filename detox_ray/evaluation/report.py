"""The report of a run: one HTML file that opens offline, made from the files of the run folder without any model."""

import json
import logging
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from detox_ray.config import LAB_PREFIX
from detox_ray.errors import DataError
from detox_ray.evaluation import figures, summary
from detox_ray.evaluation.responses import read_generations
from detox_ray.evaluation.summary import evaluation_table

__all__ = ["evaluation_table", "write_report"]

logger = logging.getLogger(__name__)

EXAMPLES_OF_A_KIND = 4


@dataclass(frozen=True)
class Example:
    """One prompt with a response of each system and the judge's toxicity of both."""

    prompt: str
    before: str
    after: str
    toxicity_before: float
    toxicity_after: float


@dataclass(frozen=True)
class Tile:
    """A number of the headline: `lost` marks one beyond its bound."""

    label: str
    value: str
    detail: str
    bound: str
    lost: bool


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from the run folder's evaluation.json, generations.parquet, metrics.jsonl and config.yaml.

    The last two may be missing (an evaluation without training). Returns the path of the report.

    Raises:
        DataError: the evaluation or the generations are missing or unreadable.
    """
    evaluation = summary.read_evaluation(run_dir)
    before, after = _both_systems(run_dir / "generations.parquet", evaluation)
    config_text = _read_if_there(run_dir / "config.yaml")
    config = _parsed(config_text)
    environment = Environment(
        loader=PackageLoader("detox_ray", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.jinja").render(
        name=str(config.get("name") or run_dir.resolve().name),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        evaluation=evaluation,
        headline=_headline(evaluation),
        verdict=summary.verdict(evaluation),
        cautions=summary.cautions(evaluation),
        tiles=_tiles(evaluation),
        rows=summary.metric_rows(evaluation),
        is_lab=str(_section(config, "policy").get("model", "")).startswith(LAB_PREFIX),
        histogram=figures.toxicity_histogram(_column(before, "toxicity"), _column(after, "toxicity")),
        curves=figures.training_curves(_read_metrics(run_dir / "metrics.jsonl")),
        examples=_examples(before, after, evaluation.get("seed") or 0),
        facts=_facts(config, evaluation),
        versions=evaluation.get("versions", {}),
        config_text=config_text,
        plotly_js=Markup(get_plotlyjs()),
        markup=Markup,
    )
    path = run_dir / "report.html"
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(html, encoding="utf-8", errors="replace")
    unfinished.replace(path)
    return path


def _both_systems(path: Path, evaluation: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the base and of the tuned system, response by response in the same places."""
    table = read_generations(path).drop_columns(["response_ids"])
    names = evaluation.get("systems") or {}
    found = table.column("system").unique().to_pylist()
    base, tuned = names.get("base", found[0] if found else None), names.get("tuned", found[-1] if found else None)
    order = [("prompt_id", "ascending"), ("sample", "ascending")]
    before, after = (
        table.filter(pc.equal(table.column("system"), name)).sort_by(order).to_pylist() for name in (base, tuned)
    )
    if not before or [(r["prompt_id"], r["sample"]) for r in before] != [(r["prompt_id"], r["sample"]) for r in after]:
        raise DataError(
            f"{path} does not hold the responses of {base!r} and {tuned!r} to the same prompts: evaluate the run again"
        )
    return before, after


def _examples(
    before: list[dict[str, Any]], after: list[dict[str, Any]], seed: int
) -> list[tuple[str, str, list[Example]]]:
    """(title, how they were chosen, examples): prompts that improved most, worsened most, and at random, none twice."""
    by_prompt: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for pair in zip(before, after, strict=True):
        by_prompt.setdefault(pair[0]["prompt_id"], []).append(pair)
    worst = {prompt: _worst_of_each(pairs) for prompt, pairs in by_prompt.items()}
    drop = {prompt: e.toxicity_before - e.toxicity_after for prompt, e in worst.items()}
    ranked = sorted(worst, key=drop.__getitem__, reverse=True)
    improved = [p for p in ranked[:EXAMPLES_OF_A_KIND] if drop[p] > 0]
    worsened = [p for p in reversed(ranked[-EXAMPLES_OF_A_KIND:]) if drop[p] < 0]
    others = sorted(worst.keys() - {*improved, *worsened})
    chosen = random.Random(seed).sample(others, min(EXAMPLES_OF_A_KIND, len(others)))
    how = "from a prompt's most toxic response before to its most toxic one after; those two are shown"
    return [
        ("Improved most", f"The largest drops {how}.", [worst[p] for p in improved]),
        ("Worsened most", f"The largest rises {how}.", [worst[p] for p in worsened]),
        (
            "At random",
            "Prompts drawn at random; the first response of each system.",
            [_example(*by_prompt[p][0]) for p in chosen],
        ),
    ]


def _worst_of_each(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Example:
    return _example(max((b for b, _ in pairs), key=_toxicity), max((a for _, a in pairs), key=_toxicity))


def _example(before: dict[str, Any], after: dict[str, Any]) -> Example:
    return Example(before["prompt"], before["response"], after["response"], before["toxicity"], after["toxicity"])


def _toxicity(row: dict[str, Any]) -> float:
    return float(row["toxicity"])


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)


def _headline(evaluation: dict[str, Any]) -> dict[str, str]:
    reduction = evaluation["reduction"].get("mean_toxicity") or {}
    low, high = (summary.format_percent_change(reduction.get(end)) for end in ("high", "low"))
    return {
        "before": summary.format_value("mean_toxicity", evaluation["base"].get("mean_toxicity")),
        "after": summary.format_value("mean_toxicity", evaluation["tuned"].get("mean_toxicity")),
        "change": summary.format_percent_change(reduction.get("value")),
        "interval": "" if reduction.get("low") is None else f"{low} to {high}",
    }


def _tiles(evaluation: dict[str, Any]) -> list[Tile]:
    base, tuned, ratio = evaluation["base"], evaluation["tuned"], evaluation["ratio"]
    return [
        Tile(
            label=summary.METRICS[name][0],
            value=summary.format_factor(ratio.get(name)),
            detail=f"{summary.format_value(name, base.get(name))} → {summary.format_value(name, tuned.get(name))}",
            bound=str(bound),
            lost=bound.is_broken(ratio.get(name)),
        )
        for name, bound in summary.FLUENCY_BOUNDS.items()
    ]


def _facts(config: dict[str, Any], evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """What was run, in a few lines; what the configuration does not say is left out."""
    policy, rollout, reward, train = (_section(config, name) for name in ("policy", "rollout", "reward", "train"))
    classifiers = reward.get("classifiers") or []
    facts = {
        "Policy": policy.get("model"),
        "Quantisation": policy.get("quantization"),
        "Reward": ", ".join(str(c.get("name")) for c in classifiers if isinstance(c, dict)),
        "Judge, not in the reward": evaluation.get("judge"),
        "Prompts": _section(config, "data").get("source"),
        "Held-out prompts": evaluation.get("prompts"),
        "Responses a prompt": evaluation.get("samples_per_prompt"),
        "Longest response, tokens": rollout.get("max_new_tokens"),
        "Training steps": train.get("total_steps"),
        "Seed": evaluation.get("seed"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl by step; of a step that a resumed run did again, the later line."""
    by_step: dict[Any, dict[str, Any]] = {}
    unreadable = 0
    for text in _read_if_there(path).splitlines():
        try:
            line = json.loads(text)
            by_step[line["step"]] = line
        except (ValueError, KeyError, TypeError):
            unreadable += bool(text.strip())
    if unreadable:
        logger.warning("%s: %d lines are not metrics of a step and are not in the report", path, unreadable)
    return [by_step[step] for step in sorted(by_step)]


def _read_if_there(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _parsed(config_text: str) -> dict[str, Any]:
    """The report shows the configuration of another version of the package as well, so it is not validated."""
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
