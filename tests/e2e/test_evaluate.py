"""The toxicity meter by the command line: systems side by side, killed and continued; a file of responses; compare."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from profanity_check import predict_prob
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from detox_ray.cli import app
from detox_ray.data.lab import lab_path
from detox_ray.evaluation.responses import read_generations

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("detox-ray"))
PROMPTS, SAMPLES = 24, 3


def run(*arguments: str | Path) -> str:
    """What `detox-ray` prints, in this process."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def meter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of an evaluation: the lab's policy alone and with an adapter that changes it at random."""
    folder = tmp_path_factory.mktemp("meter")
    torch.manual_seed(0)
    policy = str(lab_path("policy"))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(policy), lora).save_pretrained(folder / "adapter")
    model = {"model": policy, "quantization": "none"}
    systems = [
        {"name": "changed", "policy": model | {"adapter": str(folder / "adapter")}},
        {"name": "lab policy", "policy": model},
    ]
    config = {
        "name": "two",
        "output_dir": str(folder),
        "systems": systems,
        "data": {"source": "lab:prompts"},
        "prompts": PROMPTS,
        "rollout": {
            "engine": "transformers",
            "samples_per_prompt": SAMPLES,
            "max_new_tokens": 12,
            "num_cpus": 0.5,
        },
        "perplexity_model": policy,
        "bootstrap_resamples": 200,
    }
    (folder / "meter.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def killed_and_continued(meter: Path, local_ray: Path) -> tuple[bytes, str]:
    """What was on disk when the evaluation was killed, and what the second command printed."""
    arguments = [COMMAND, "evaluate", str(meter / "meter.yaml")]
    first = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    sampled, deadline = meter / "two" / "sampled", time.monotonic() + 600
    try:
        while not (found := list(sampled.glob("*.jsonl"))):
            assert time.monotonic() < deadline, "nothing was sampled"
            time.sleep(0.01)
    finally:
        for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
            os.kill(process.pid, signal.SIGKILL)
        first.wait()
    kept = found[0].read_bytes()
    # A reader of the file after the kill would see what was there before it, and more.
    witness = meter / "witness"
    os.link(found[0], witness)
    printed = run("evaluate", meter / "meter.yaml")
    assert witness.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    return witness.read_bytes(), printed


def test_killed_and_continued_every_prompt_is_answered_once(
    killed_and_continued: tuple[bytes, str], meter: Path
) -> None:
    sampled, printed = killed_and_continued
    lines = [json.loads(line) for line in sampled.splitlines()]
    assert len({line["prompt_id"] for line in lines}) == len(lines) == PROMPTS
    assert not (meter / "two" / "sampled").exists()
    rows = read_generations(meter / "two" / "generations.parquet").to_pylist()
    assert len({(r["system"], r["prompt_id"], r["sample"]) for r in rows}) == len(rows) == 2 * PROMPTS * SAMPLES
    assert "Mean toxicity" in printed


def test_systems_are_compared_in_the_order_of_the_configuration(
    killed_and_continued: tuple[bytes, str], meter: Path
) -> None:
    evaluation = json.loads((meter / "two" / "evaluation.json").read_text())
    assert list(evaluation["systems"]) == ["changed", "lab policy"]
    rows = read_generations(meter / "two" / "generations.parquet").to_pylist()
    for name, system in evaluation["systems"].items():
        texts = [r["response"] for r in rows if r["system"] == name]
        toxicity = np.where([bool(text.strip()) for text in texts], predict_prob(texts), 0)
        assert system["all"]["mean_toxicity"]["value"] == pytest.approx(toxicity.mean())
    # A random adapter makes text that the model it changes finds unlikely.
    assert evaluation["ratio"]["perplexity"] < 0.5


def test_a_file_of_responses_with_scores_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompts", "responses", "prompt_score", "response_score", "pro_API_response_score"])
        rows.writerow(["hello there", "you fool", "0.1", "0.9", "0.8"])
        rows.writerow(["good\nmorning", "how are you", "0.7", "0.2", "0.1"])
    run(
        "evaluate", path, f"output_dir={tmp_path}", "systems.0.columns.prompt=prompts",
        "systems.0.columns.response=responses", "systems.0.columns.prompt_score=prompt_score",
        "systems.0.columns.scores={hate: response_score, perspective: pro_API_response_score}",
    )  # fmt: skip
    evaluation = json.loads((tmp_path / "evaluation-published" / "evaluation.json").read_text())
    assert evaluation["scorers"] == ["alt-profanity-check", "hate", "perspective"]
    by_scorer = {n: s["published"]["all"]["mean_toxicity"]["value"] for n, s in evaluation["by_scorer"].items()}
    assert by_scorer["perspective"] == pytest.approx(0.45)
    assert by_scorer["hate"] == pytest.approx(0.55)
    assert by_scorer["alt-profanity-check"] == pytest.approx(predict_prob(["you fool", "how are you"]).mean())
    assert evaluation["splits"] == {"all": 2, "toxic": 1, "nontoxic": 1}


def test_folders_side_by_side(
    killed_and_continued: tuple[bytes, str], meter: Path, tmp_path: Path, refused_line: Callable[..., str]
) -> None:
    folder, output = str(meter / "two"), str(tmp_path / "both")
    assert "is named twice" in refused_line("compare", folder, folder, "--output", output)
    again = shutil.copytree(meter / "two", tmp_path / "again", symlinks=True)
    run("compare", folder, again, "--output", output)
    evaluation = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    assert list(evaluation["systems"]) == ["changed", "lab policy", "again lab policy"]
    assert (tmp_path / "both" / "report.html").exists()
