"""The whole run on the offline lab by the command line: killed, continued, evaluated again, failed."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from detox_ray import load_config
from detox_ray.cli import app
from detox_ray.data.lab import lab_path
from detox_ray.learner.checkpoint_folder import last_whole_checkpoint, read_checkpoint
from detox_ray.metric_names import FAMILIES, JUDGED, TRAINING
from detox_ray.metrics_file import read_metrics

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
COMMAND = [str(Path(sys.executable).with_name("detox-ray")), "train", str(ROOT / "configs/laptop.yaml")]
STEPS = 6
# What a step says of this attempt at it, not of its result.
CLOCKED = {name for name in TRAINING if name.startswith("time_")}
CLOCKED |= {"ended_at", "tokens_per_s", "samples_per_s", "adapter_version", "worker_restarts"}
SMALL = [
    f"train.total_steps={STEPS}",
    "train.checkpoint_every=2",
    "train.threads=1",
    "ppo.batch_size=16",
    "rollout.workers=1",
    "reward.calibration_prompts=32",
    "evaluation.prompts=16",
    "evaluation.samples_per_prompt=2",
    "evaluation.every=2",
    "evaluation.every_prompts=8",
]


def wait_for_steps(metrics: Path, steps: int, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline, "no steps appeared"
        time.sleep(0.2)


def alive_on(driver: psutil.Process) -> list[psutil.Process]:
    """The raylet, its store and the actors that a driver started.

    Not Ray's two agents a node, which outlive a killed driver by a minute or two and then end by themselves.
    """
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    titled = [(process, " ".join(process.cmdline())) for process in driver.children(recursive=True)]
    return [p for p, title in titled if title and not title.startswith(agents) and "agent.py" not in title]


@dataclass(frozen=True)
class Continued:
    """A run that was killed and continued: its folder, what it printed, and its metrics before each kill."""

    folder: Path
    printed: str
    before_kills: list[dict[str, Any]]


@pytest.fixture(scope="module")
def killed(local_ray: Path, tmp_path_factory: pytest.TempPathFactory) -> Continued:
    """A run whose learner was killed after step 3 and whose driver after step 5, continued from a moved folder."""
    output = tmp_path_factory.mktemp("runs")
    with open(output / "first.log", "w", encoding="utf-8") as log:
        first = subprocess.Popen([*COMMAND, "name=killed", f"output_dir={output}", *SMALL], stdout=log, stderr=log)
    metrics = output / "killed" / "metrics.jsonl"
    try:
        wait_for_steps(metrics, 3)
        driver = psutil.Process(first.pid)
        [learner] = [p for p in alive_on(driver) if "RayTrainWorker" in p.cmdline()[0]]
        learner.send_signal(signal.SIGKILL)
        before = read_metrics(metrics)
        wait_for_steps(metrics, 5)
        started = alive_on(driver)
    finally:
        first.kill()
        first.wait()
    before += read_metrics(metrics)
    _, left = psutil.wait_procs(started, timeout=120)
    left = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"left behind: {[p.cmdline() for p in left]}"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (output / "killed").rename(elsewhere / "moved")
    arguments = [*COMMAND[1:], "name=moved", f"output_dir={elsewhere}", *SMALL]
    second = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert second.exit_code == 0, second.output
    return Continued(elsewhere / "moved", second.stdout, before)


def test_a_killed_run_continues_without_gap_or_repeat(killed: Continued) -> None:
    folder, printed = killed.folder, killed.printed
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert f"step {STEPS}/{STEPS}" in printed
    found = last_whole_checkpoint(folder / "checkpoints")
    assert found is not None
    assert found[0] == STEPS - 1
    _, state = read_checkpoint(found[1])
    config = load_config(ROOT / "configs/laptop.yaml")
    # An optimiser that had started anew would have counted only the steps since then.
    updates = {int(s["step"]) for s in state["now"]["optimizer"]["state"].values()}
    assert updates == {STEPS * config.ppo.epochs * config.ppo.minibatches}


def test_steps_that_were_run_again_came_out_the_same(killed: Continued) -> None:
    lines = read_metrics(killed.folder / "metrics.jsonl")
    assert {line["step"] for line in killed.before_kills} >= {0, 1, 2, 3, 4}
    for old in killed.before_kills:
        new = lines[old["step"]]
        differ = {name for name in old if old[name] != new[name]} - CLOCKED
        assert not differ, f"step {old['step']}: {differ}"


def test_every_line_of_metrics_has_what_is_declared(killed: Continued) -> None:
    lines = [json.loads(line) for line in (killed.folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert {name for name in line if "/" not in name} == TRAINING.keys()
        assert "reward/lab-linear" in line
        assert {name.partition("/")[0] for name in line if "/" in name} <= FAMILIES.keys()
        assert line["logprob_gap_max"] < 1e-3
        assert all(value == value for value in line.values())


def test_the_judge_looked_on_while_it_trained(killed: Continued) -> None:
    lines = [json.loads(line) for line in (killed.folder / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 5]
    for line in lines:
        assert 0 <= line["mean_toxicity"] <= 1
        assert line["responses"] == 8
        assert line["mean_length"] > 0
        assert line.keys() == JUDGED.keys()


def test_the_run_folder_is_complete(killed: Continued) -> None:
    folder, printed = killed.folder, killed.printed
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for system in ("base", "tuned"):
        assert {"mean_toxicity", "share_toxic", "perplexity", "distinct_2", "mean_length"} <= evaluation[system].keys()
    assert {"value", "low", "high"} == evaluation["reduction"]["mean_toxicity"].keys()
    assert (evaluation["prompts"], evaluation["samples_per_prompt"], evaluation["seed"]) == (16, 2, 0)
    assert evaluation["judge"] == "alt-profanity-check"
    assert pq.read_table(folder / "generations.parquet").num_rows == 2 * 16 * 2
    assert "<script" in (folder / "report.html").read_text()
    assert "Mean toxicity" in printed


def test_the_adapter_loads_with_plain_peft(killed: Continued) -> None:
    base = AutoModelForCausalLM.from_pretrained(lab_path("policy"))
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = base(ids).logits
        tuned = PeftModel.from_pretrained(base, killed.folder / "adapter")
        assert (tuned(ids).logits - before).abs().max() > 1e-3


def test_a_complete_run_is_not_run_again_and_not_overwritten(
    killed: Continued, refused_line: Callable[..., str]
) -> None:
    folder = killed.folder
    arguments = [*COMMAND[1:], "name=moved", f"output_dir={folder.parent}", *SMALL]
    before = (folder / "metrics.jsonl").read_bytes()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0
    assert "is complete" in again.output
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert "holds a run with ppo.learning_rate" in refused_line(*arguments, "ppo.learning_rate=0.01")
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds the folder any more


def test_an_evaluation_can_be_repeated(killed: Continued, refused_line: Callable[..., str]) -> None:
    folder = killed.folder
    before = json.loads((folder / "evaluation.json").read_text())
    again = CliRunner().invoke(app, ["evaluate", str(folder)], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    after = json.loads((folder / "evaluation.json").read_text())
    assert after["base"]["mean_toxicity"] == pytest.approx(before["base"]["mean_toxicity"], abs=1e-6)
    assert after["tuned"]["mean_toxicity"] == pytest.approx(before["tuned"]["mean_toxicity"], abs=1e-6)
    assert "the run holds out 200 prompts" in refused_line("evaluate", str(folder), "prompts=9999")


@pytest.mark.usefixtures("local_ray")
def test_a_classifier_that_fails_stops_the_run_with_its_name(
    modules: Path, tmp_path: Path, refused_line: Callable[..., str]
) -> None:
    (modules / "fails_later.py").write_text(
        "calls = 0\n\n\ndef toxicity(texts):\n    global calls\n    calls += 1\n"
        "    if calls > 2:\n        raise OSError('no more')\n    return [len(t) % 7 / 7 for t in texts]\n"
    )
    settings = [
        "name=failing", f"output_dir={tmp_path}", *SMALL, "reward.retries=1",
        "reward.classifiers=[{name: weak, kind: linear, model: 'fails_later:toxicity'}]", "rollout.engine=transformers",
    ]  # fmt: skip
    assert "'weak'" in refused_line(*COMMAND[1:], *settings)
