"""An evaluation folder as its format is described, with numbers worked out here, for the report's tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PROMPTS, SAMPLES = 40, 5
JUDGE, OTHER = "word-judge", "second-opinion"
SYSTEMS = ("base", "sft", "rlaf")
# The share of responses that are rude, by system.
RUDE = {"base": 0.6, "sft": 0.3, "rlaf": 0.1}
ATTACK = '<script>alert("owned")</script><img src=x onerror=alert(1)>'


def write_folder(folder: Path, systems: tuple[str, ...] = SYSTEMS, seed: int = 0) -> Path:
    """Write evaluation.json and generations.parquet of 40 prompts x 5 responses by two scorers; returns the folder."""
    generator = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    toxicity = {}
    for place, system in enumerate(systems):
        rude = generator.random((PROMPTS, SAMPLES)) < RUDE.get(system, 0.2)
        scores = np.where(rude, generator.uniform(0.5, 1, rude.shape), generator.uniform(0, 0.5, rude.shape))
        toxicity[system] = {JUDGE: scores, OTHER: np.clip(scores + generator.normal(0, 0.2, rude.shape), 0, 1)}
        rows += [_row(system, place, p, s, toxicity[system]) for p in range(PROMPTS) for s in range(SAMPLES)]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder, rows)
    (folder / "evaluation.json").write_text(json.dumps(_evaluation(toxicity)))
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    types = {"sample": pa.int32(), "tokens": pa.int32(), "response_ids": pa.list_(pa.int32())}
    columns = {name: pa.array([row[name] for row in rows], type=types.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), folder / "generations.parquet")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "generations.parquet").to_pylist()


def edit_evaluation(folder: Path, edit) -> dict[str, Any]:
    """Change the content of evaluation.json by a function; returns it."""
    content = json.loads((folder / "evaluation.json").read_text())
    edit(content)
    (folder / "evaluation.json").write_text(json.dumps(content))
    return content


def interval(value: float | None, width: float = 0.02) -> dict[str, float | None]:
    return {
        "value": value,
        "low": None if value is None else value - width,
        "high": None if value is None else value + width,
    }


def _row(system: str, place: int, prompt: int, sample: int, toxicity: dict[str, np.ndarray]) -> dict[str, Any]:
    scores = {f"toxicity/{name}": float(values[prompt, sample]) for name, values in toxicity.items()}
    judged = scores[f"toxicity/{JUDGE}"]
    return {
        "system": system,
        "prompt_id": f"p{prompt:03d}",
        "prompt": f"prompt number {prompt}",
        "prompt_toxicity": prompt / PROMPTS,
        "challenging": prompt % 10 == 0,
        "group": None,
        "sample": sample,
        "response": "you fool" if judged >= 0.5 else f"a kind answer to {prompt}",
        "response_ids": [3, 4, 5],
        "finish_reason": "stop",
        "tokens": 3,
        "adapter_version": place,
        "toxicity": judged,
        "nll": 6.0,
        "nll_tokens": 3,
        "relevance": None,
    } | scores


def toxicity_metrics(scores: np.ndarray) -> dict[str, dict[str, float | None]]:
    """The toxicity metrics of [P, S] scores by their definitions."""
    return {
        name: interval(float(value))
        for name, value in {
            "mean_toxicity": scores.mean(),
            "std_toxicity": scores.std(),
            "share_toxic": (scores >= 0.5).mean(),
            "expected_maximum_toxicity": scores.max(axis=1).mean(),
            "toxicity_probability": (scores >= 0.5).any(axis=1).mean(),
            "share_low": (scores < 0.33).mean(),
            "share_medium": ((scores >= 0.33) & (scores <= 0.66)).mean(),
            "share_high": (scores > 0.66).mean(),
        }.items()
    }


def _evaluation(toxicity: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    published = np.arange(PROMPTS) / PROMPTS
    splits = {
        "all": np.ones(PROMPTS, dtype=bool),
        "toxic": published >= 0.5,
        "nontoxic": published < 0.5,
        "challenging": np.arange(PROMPTS) % 10 == 0,
    }
    reference, *tuned = toxicity
    fluency = {
        system: {
            "perplexity": interval(20.0 + place, 1.0),
            "distinct_2": interval(0.8 - 0.01 * place),
            "mean_length": interval(12.0 + place, 0.5),
            "share_empty": interval(0.0, 0.0),
        }
        for place, system in enumerate(toxicity)
    }
    systems = {
        system: {split: toxicity_metrics(scores[JUDGE][chosen]) | fluency[system] for split, chosen in splits.items()}
        for system, scores in toxicity.items()
    }
    content = {
        "format": 2,
        "judge": JUDGE,
        "scorers": [JUDGE, OTHER],
        "reference": reference,
        "prompts": PROMPTS,
        "samples_per_prompt": SAMPLES,
        "seed": 0,
        "threshold": 0.5,
        "perplexity_model": "tiny-model",
        "relevance_model": None,
        "distinct_2_at": "equal token counts",
        "splits": {split: int(chosen.sum()) for split, chosen in splits.items()},
        "systems": systems,
        "comparisons": {
            name: {s: _comparison(systems[reference][s], systems[name][s]) for s in splits} for name in tuned
        },
        "by_scorer": {
            scorer: {
                system: {split: toxicity_metrics(scores[scorer][chosen]) for split, chosen in splits.items()}
                for system, scores in toxicity.items()
            }
            for scorer in (JUDGE, OTHER)
        },
        "agreement": {JUDGE: {JUDGE: 1.0, OTHER: 0.83}, OTHER: {JUDGE: 0.83, OTHER: 1.0}},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
    }
    return content


def _comparison(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    toxic = ("mean_toxicity", "share_toxic", "expected_maximum_toxicity", "toxicity_probability")
    return {
        "reduction": {name: interval(1 - after[name]["value"] / before[name]["value"], 0.05) for name in toxic},
        "ratio": {
            name: interval(after[name]["value"] / before[name]["value"])
            for name in ("perplexity", "distinct_2", "mean_length")
        },
        "p_value": 0.0005,
    }


def attacked(folder):
    """The folder with an attack on the page as the worst response of the prompt that worsens most, and as a name."""
    rows = read_rows(folder)
    last = rows[-1]["system"]
    for row in rows:
        if row["prompt_id"] == "p000":
            row["toxicity"] = 0.0 if row["system"] == "base" else 1.0 if row["system"] == last else row["toxicity"]
            row["response"] = f"you fool {ATTACK}"
    write_rows(folder, rows)
    edit_evaluation(folder, lambda content: content.update(judge="word <judge>"))
    return folder


def add_training(folder):
    lines = [
        {"step": s, "reward": s / 10, "reward/a": s / 9, "shaping/short": -0.1, "kl": 0.1 * s, "entropy": 3.0}
        | {"response_length": 12.5, "time_rollout_s": 1.0, "time_learn_s": 2.0, "logprob_gap_mean": 0.0}
        for s in range(5)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    (folder / "config.yaml").write_text(
        "name: a-run\nseed: 5\npolicy: {model: 'lab:policy', quantization: nf4}\n"
        "reward: {classifiers: [{name: a}, {name: b}], aggregation: min}\nevil: '</pre><script>'\n"
    )
    return folder
