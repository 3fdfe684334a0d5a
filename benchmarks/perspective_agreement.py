"""Do our scorers agree with Perspective? Its stored scores of RealToxicityPrompts' continuations against ours.

    python benchmarks/perspective_agreement.py FILE... [--model FOLDER --label NAME]

FILE is in the published format: one JSON object a line, with `continuation.text` and Perspective's scores of it, by
attribute. Scorers: alt-profanity-check, with --model a sequence classifier as well, and then their mean. All of them
have one score, toxicity, which is compared with each attribute in turn: Spearman's correlation, and the ROC-AUC of
telling texts that Perspective gives 0.5 or more from the others, both with 95% bootstrap intervals over texts.
Perspective's scores are of 2020; a text without them is left out and counted.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, machine, write_json
from rich.console import Console
from rich.table import Table

from detox_ray.calibration import agreement, read_all
from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import EvaluationConfig, RewardConfig
from detox_ray.data.labelled_texts import LabelledTexts, read_labelled_texts
from detox_ray.evaluation.metrics import TOXIC_THRESHOLD
from detox_ray.evaluation.report_parts import jsonable
from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.calibration_fit import probabilities
from detox_ray.terminal import quieten_libraries

PACKAGES = ("alt-profanity-check", "torch", "transformers", "scikit-learn")
ATTRIBUTES = (
    *("toxicity", "severe_toxicity", "insult", "profanity"),
    *("threat", "identity_attack", "sexually_explicit", "flirtation"),
)
# An area under a curve with fewer texts than this on one side of 0.5 says little; it is marked.
FEW = 30


def main() -> None:
    """Score, compare, print the tables, write the JSON."""
    options = _options()
    quieten_libraries()
    console = Console()
    facts = machine(PACKAGES)
    console.print(describe(facts))
    config = _service(options)
    columns = [f"continuation.{name}" for name in ATTRIBUTES]
    results = {}
    for file in options.files:
        data = read_labelled_texts(file, "continuation.text", columns)
        results[file.name] = _agreements(data, config)
        console.print(_table(file.name, results[file.name]))
    models = {c.name: c.model for c in config.reward.classifiers}
    write_json(options.out, {"files": results, "models": models, "machine": facts})
    console.print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="RealToxicityPrompts, JSON lines")
    parser.add_argument("--model", help="folder or hub id of a sequence classifier, scored as well")
    parser.add_argument("--label", default="toxic", help="its label that means toxic (toxic)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/perspective_agreement.json"))
    return parser.parse_args()


def _service(options: argparse.Namespace) -> ApiConfig:
    """The scorers as the service would have them; TOXICITY is their mean."""
    classifiers = [EvaluationConfig().judge]
    if options.model:
        name = Path(options.model).name
        classifiers.append(ClassifierConfig(name=name, kind="transformers", model=options.model, label=options.label))
    return ApiConfig(reward=RewardConfig(classifiers=classifiers))


def _agreements(data: LabelledTexts, config: ApiConfig) -> dict[str, Any]:
    """Counts, and by attribute and scorer the agreement."""
    parts = read_all(config.reward.classifiers, data.texts)
    scorers = {c.name: probabilities(f"classifiers.{c.name}", config, parts) for c in config.reward.classifiers}
    if len(scorers) > 1:
        scorers["mean"] = probabilities("attributes.TOXICITY", config, parts)
    by_attribute = {}
    for name in ATTRIBUTES:
        reference = data.numbers[f"continuation.{name}"]
        scored = ~np.isnan(reference)
        by_attribute[name] = {
            "texts": int(scored.sum()),
            "high": int((reference >= TOXIC_THRESHOLD).sum()),
            "scorers": {
                scorer: jsonable(agreement(values[scored], reference[scored])) for scorer, values in scorers.items()
            },
        }
    return {"rows": data.rows, "left_out": data.left_out, "attributes": by_attribute}


def _table(title: str, result: dict[str, Any]) -> Table:
    left_out = sum(result["left_out"].values())
    table = Table(
        title=f"{title}: {result['rows']:,} rows, {left_out:,} left out; * fewer than {FEW} on one side of 0.5"
    )
    table.add_column("Perspective", no_wrap=True)
    table.add_column("n (>= 0.5)", justify="right")
    for scorer in result["attributes"][ATTRIBUTES[0]]["scorers"]:
        for measure in ("Spearman", "ROC-AUC"):
            table.add_column(f"{scorer}\n{measure}", justify="right", overflow="fold")
    for name, found in result["attributes"].items():
        mark = "*" if min(found["high"], found["texts"] - found["high"]) < FEW else ""
        cells = [_cell(measured) for by in found["scorers"].values() for measured in by.values()]
        table.add_row(name.upper(), f"{found['texts']:,} ({found['high']:,}{mark})", *cells)
    return table


def _cell(interval: dict[str, float | None]) -> str:
    if interval["value"] is None:
        return "n/a"
    return f"{interval['value']:.3f}\n[dim]{interval['low']:.3f} to {interval['high']:.3f}[/dim]"


if __name__ == "__main__":
    main()
