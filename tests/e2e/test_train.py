"""The whole run on the offline lab by the command line: killed, continued, evaluated again; and by the Python API."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from detox_ray import load_config
from detox_ray.cli import app
from detox_ray.data.lab import lab_path
from detox_ray.metric_names import FAMILIES, JUDGED, TRAINING
from detox_ray.run_folder import RunFolder

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
COMMAND = [str(Path(sys.executable).with_name("detox-ray")), "train", str(ROOT / "configs/laptop.yaml")]
STEPS = 8
SMALL = [
    f"train.total_steps={STEPS}",
    "train.checkpoint_every=2",
    "ppo.batch_size=32",
    "reward.calibration_prompts=32",
    "evaluation.prompts=16",
    "evaluation.samples_per_prompt=2",
    "evaluation.every=2",
    "evaluation.every_prompts=8",
]


def run(arguments: list[str], timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, check=False)


def wait_for_steps(metrics: Path, steps: int, timeout_s: float = 240) -> None:
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


@pytest.fixture(scope="module")
def killed_and_continued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose learner was killed after step 3 and whose driver after step 5, then continued; what it printed."""
    output = tmp_path_factory.mktemp("runs")
    arguments = [*COMMAND, "name=killed", f"output_dir={output}", *SMALL]
    with open(output / "first.log", "w", encoding="utf-8") as log:
        first = subprocess.Popen(arguments, stdout=log, stderr=log, cwd=ROOT)
    metrics = output / "killed" / "metrics.jsonl"
    wait_for_steps(metrics, 3)
    driver = psutil.Process(first.pid)
    [learner] = [p for p in alive_on(driver) if "RayTrainWorker" in p.cmdline()[0]]
    learner.send_signal(signal.SIGKILL)
    wait_for_steps(metrics, 5)
    started = alive_on(driver)
    driver.send_signal(signal.SIGKILL)
    first.wait()
    _, left = psutil.wait_procs(started, timeout=60)
    left = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"left behind: {[p.cmdline() for p in left]}"
    second = run(arguments)
    assert second.returncode == 0, second.stdout + second.stderr
    return output / "killed", second.stdout


def test_a_killed_run_continues_without_gap_or_repeat(killed_and_continued: tuple[Path, str]) -> None:
    folder, printed = killed_and_continued
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert f"step {STEPS}/{STEPS}" in printed
    checkpoints = sorted(p for p in (folder / "checkpoints").glob("checkpoint_*") if p.is_dir())
    state = torch.load(checkpoints[-1] / "learner.pt", weights_only=True)
    assert state["step"] == STEPS - 1
    config = load_config(ROOT / "configs/laptop.yaml")
    # An optimiser that had started anew would have counted only the steps since then.
    updates = {int(s["step"]) for s in state["optimizer"]["state"].values()}
    assert updates == {STEPS * config.ppo.epochs * config.ppo.minibatches}


def test_every_line_of_metrics_has_what_a_user_looks_for(killed_and_continued: tuple[Path, str]) -> None:
    lines = [json.loads(line) for line in (killed_and_continued[0] / "metrics.jsonl").read_text().splitlines()]
    expected = {"reward", "reward_raw", "kl", "entropy", "clip_fraction", "approx_kl", "explained_variance", "toxicity"}
    expected |= {"logprob_gap_mean", "logprob_gap_max", "response_length", "tokens_per_s", "disagreement"}
    expected |= {"time_rollout_s", "time_reward_s", "time_learn_s", "time_push_s", "reward/lab-linear"}
    for line in lines:
        assert expected <= line.keys()
        assert {name for name in line if "/" not in name} <= TRAINING.keys()
        assert {name.partition("/")[0] for name in line if "/" in name} <= FAMILIES.keys()
        assert line["logprob_gap_max"] < 1e-3
        assert all(value == value for value in line.values())


def test_the_judge_looked_on_while_it_trained(killed_and_continued: tuple[Path, str]) -> None:
    lines = [json.loads(line) for line in (killed_and_continued[0] / "evaluations.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    # The one under way when the driver was killed may be missing.
    assert set(steps) <= {1, 3, 5, 7}
    assert {5, 7} <= set(steps)
    assert len(steps) == len(set(steps))
    for line in lines:
        assert 0 <= line["mean_toxicity"] <= 1
        assert line["responses"] == 8
        assert line["mean_length"] > 0
        assert line.keys() == JUDGED.keys()


def test_the_run_folder_is_complete(killed_and_continued: tuple[Path, str]) -> None:
    folder, printed = killed_and_continued
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for system in ("base", "tuned"):
        assert {"mean_toxicity", "share_toxic", "perplexity", "distinct_2", "mean_length"} <= evaluation[system].keys()
    assert {"value", "low", "high"} == evaluation["reduction"]["mean_toxicity"].keys()
    assert (evaluation["prompts"], evaluation["samples_per_prompt"], evaluation["seed"]) == (16, 2, 0)
    assert evaluation["judge"] == "alt-profanity-check"
    assert pq.read_table(folder / "generations.parquet").num_rows == 2 * 16 * 2
    assert "<script" in (folder / "report.html").read_text()
    assert "Mean toxicity" in printed


def test_the_adapter_loads_with_plain_peft(killed_and_continued: tuple[Path, str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(lab_path("policy"))
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = base(ids).logits
        tuned = PeftModel.from_pretrained(base, killed_and_continued[0] / "adapter")
        assert (tuned(ids).logits - before).abs().max() > 1e-3


def test_a_complete_run_is_not_run_again_and_not_overwritten(
    killed_and_continued: tuple[Path, str], refused_line: Callable[..., str]
) -> None:
    folder, _ = killed_and_continued
    arguments = [*COMMAND[1:], "name=killed", f"output_dir={folder.parent}", *SMALL]
    before = (folder / "metrics.jsonl").read_bytes()
    try:
        again = CliRunner().invoke(app, arguments)
        assert again.exit_code == 0
        assert "is complete" in again.output
        assert (folder / "metrics.jsonl").read_bytes() == before
        assert "holds a run with ppo.learning_rate" in refused_line(*arguments, "ppo.learning_rate=0.01")
    finally:
        RunFolder(folder).release()


def test_an_evaluation_can_be_repeated(
    killed_and_continued: tuple[Path, str], refused_line: Callable[..., str]
) -> None:
    folder, _ = killed_and_continued
    before = json.loads((folder / "evaluation.json").read_text())
    again = run([COMMAND[0], "evaluate", str(folder)])
    assert again.returncode == 0, again.stdout + again.stderr
    after = json.loads((folder / "evaluation.json").read_text())
    assert after["base"]["mean_toxicity"] == pytest.approx(before["base"]["mean_toxicity"], abs=1e-6)
    assert after["tuned"]["mean_toxicity"] == pytest.approx(before["tuned"]["mean_toxicity"], abs=1e-6)
    assert "the run holds out 200 prompts" in refused_line("evaluate", str(folder), "prompts=9999")


def test_python_api_two_learners_stale_rollouts_on_the_transformers_engine(tmp_path: Path) -> None:
    settings = [
        "name=api", f"output_dir={tmp_path}", *SMALL, "train.total_steps=3", "train.workers=2", "train.num_cpus=0.5",
        "train.threads=1", "rollout.engine=transformers", "rollout.max_staleness=1", "rollout.samples_per_prompt=4",
        "ppo.estimator=rloo", "policy.quantization=none",
    ]  # fmt: skip
    code = f"""
from detox_ray import load_config, train
if __name__ == "__main__":
    evaluation = train(load_config("configs/laptop.yaml", {settings!r}), quiet=True)
    assert evaluation["prompts"] == 16
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    result = run([sys.executable, str(script)])
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    lines = [json.loads(line) for line in (tmp_path / "api" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["staleness"] for line in lines] == [0, 1, 1]
    tensors = load_file(tmp_path / "api" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())


def test_a_classifier_that_fails_stops_the_run_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "calls = 0\n\n\ndef toxicity(texts):\n    global calls\n    calls += 1\n"
        "    if calls > 2:\n        raise OSError('no more')\n    return [len(t) % 7 / 7 for t in texts]\n"
    )
    settings = [
        "name=failing", f"output_dir={tmp_path}", *SMALL, "reward.retries=1",
        "reward.classifiers=[{name: weak, kind: linear, model: 'failing:toxicity'}]", "rollout.engine=transformers",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [*COMMAND, *settings], capture_output=True, text=True, timeout=300, cwd=ROOT, check=False, env=environment
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ")
    assert "'weak'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
