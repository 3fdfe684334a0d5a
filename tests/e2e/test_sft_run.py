"""A fine-tuning by the command line on Ray Train: killed and continued, it is the run that nobody disturbed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from detox_ray.cli import app
from detox_ray.data.example_split import load_examples
from detox_ray.learner.sft import SFT, BucketedBatches
from detox_ray.metric_names import TUNING
from detox_ray.policy.adapter import load_adapter
from detox_ray.policy.load import end_token_ids, load_tokenizer
from detox_ray.policy.policy import Policy
from detox_ray.sft_config import SFTConfig, load_sft_config

pytestmark = pytest.mark.e2e
STEPS, EVERY = 25, 5


@pytest.fixture
def config(tiny_model: str, tmp_path: Path) -> Path:
    """Answers that say the question in capitals, to a learner with dropout."""
    rng = random.Random(0)
    prompts = ["".join(rng.choices("abcdefgh ", k=rng.randint(20, 60))).strip() for _ in range(300)]
    lines = [json.dumps({"prompt": prompt, "response": prompt.upper()}) + "\n" for prompt in prompts]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    path = tmp_path / "sft.yaml"
    path.write_text(
        f"""
name: killed
output_dir: {tmp_path}
data: {{source: {tmp_path / "pairs.jsonl"}, dev_examples: 40, template: "{{prompt}}= "}}
policy: {{model: {tiny_model}, quantization: none, lora: {{rank: 4, dropout: 0.1}}}}
train: {{total_steps: {STEPS}, batch_size: 32, evaluate_every: {EVERY}, learning_rate: 3.0e-3}}
"""
    )
    return path


def undisturbed(config: SFTConfig) -> tuple[list[float], SFT]:
    """The losses of all steps and the learner after them, in this process without Ray."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(config.policy)
    examples = load_examples(config.data, tokenizer, end_token_ids(config.policy, tokenizer), config.seed)
    batches = BucketedBatches(examples.train, config.train.batch_size, config.seed)
    policy = Policy(config.policy, torch.device("cpu"), config.seed)
    sft = SFT(policy, config.train, config.train.microbatch_tokens, int(tokenizer.pad_token_id), STEPS, config.seed)
    sft.evaluate(examples.dev, 0)
    losses: list[float] = []
    for step in range(STEPS):
        losses.append(sft.update(batches(step), step)["loss"])
        if (step + 1) % EVERY == 0:
            sft.evaluate(examples.dev, step + 1)
    return losses, sft


@pytest.mark.usefixtures("local_ray")
def test_a_killed_run_continues_as_the_run_it_would_have_been(config: Path, tiny_model: str) -> None:
    folder = config.parent / "killed"
    command = [str(Path(sys.executable).with_name("detox-ray")), "sft", str(config)]
    with open(config.parent / "first.log", "w", encoding="utf-8") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 600
    file = folder / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < 2 * EVERY + 2:
        assert time.monotonic() < deadline, "no steps appeared"
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (folder / "fine_tuning.json").exists()
    second = CliRunner().invoke(app, ["sft", str(config)], catch_exceptions=False)
    assert second.exit_code == 0, second.output
    assert f"step {STEPS}/{STEPS}" in second.stdout

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    losses, sft = undisturbed(load_sft_config(config))
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert {name for line in lines for name in line} == TUNING.keys()
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    result = json.loads((folder / "fine_tuning.json").read_text())
    assert result["dev_loss"] == min(line["dev_loss"] for line in lines if "dev_loss" in line)
    assert result["dev_loss"] < result["dev_loss_before"] - 0.1
    assert result["best_steps"] == sft.dev_loss.best_steps
    for name, tensor in load_adapter(folder / "adapter").tensors.items():
        assert abs(tensor - sft.best.tensors[name]).max() < 1e-4

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = base(ids).logits
        assert (PeftModel.from_pretrained(base, folder / "adapter")(ids).logits - before).abs().max() > 1e-2
