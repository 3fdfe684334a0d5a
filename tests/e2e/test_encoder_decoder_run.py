"""A T5 on Ray: fine-tuned on dialogues, then detoxified with toxic texts mixed in, and judged."""

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

from detox_ray import fine_tune, load_config, load_sft_config, train

pytestmark = pytest.mark.e2e


@pytest.fixture
def folder(tmp_path: Path, tiny_t5: str) -> Path:
    """Dialogues, rude texts, and the configurations of a fine-tuning and of a detoxification that goes on from it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(120)]
    dialogues = [
        {"dialogue": f"#Person1#: Tell me of {w}.\n#Person2#: No.", "summary": f"#Person1# asks of {w}."} for w in words
    ]
    (tmp_path / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    texts = [{"prompt": {"text": f"you stupid fool {w}", "toxicity": 0.9}} for w in words[:40]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    policy = f"model: {tiny_t5}, quantization: nf4, lora: {{rank: 4}}"
    data = f'source: {tmp_path / "dialogues.jsonl"}, template: "Summarize: {{prompt}}", max_tokens: 120'
    (tmp_path / "sft.yaml").write_text(
        f"""
name: sft
output_dir: {tmp_path}
data: {{{data}, dev_examples: 20}}
policy: {{{policy}}}
train: {{total_steps: 6, evaluate_every: 3, learning_rate: 3.0e-3}}
"""
    )
    (tmp_path / "train.yaml").write_text(
        f"""
name: run
output_dir: {tmp_path}
data:
  {{{data}, format: dialogsum, heldout_prompts: 16, mixed_in: [{{source: {tmp_path / "texts.jsonl"}, min_score: 0.5}}]}}
policy: {{{policy}, adapter: {tmp_path / "sft" / "adapter"}, reference: adapter}}
rollout: {{num_cpus: 0.5, max_new_tokens: 8, temperature: 0.7}}
reward: {{classifiers: [{{name: words, kind: linear, model: "lab:linear", num_cpus: 0.2}}]}}
ppo: {{batch_size: 16}}
train: {{total_steps: 2, num_cpus: 0.5}}
evaluation:
  judge: {{name: decided, kind: linear, model: "profanity_check:predict", output: probability, calibration: none}}
  prompts: 8
  samples_per_prompt: 1
"""
    )
    return tmp_path


@pytest.mark.usefixtures("local_ray")
def test_fine_tuned_then_detoxified(
    folder: Path, tiny_t5: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded: list[str] = []  # apps on a Serve that would outlive this process
    monkeypatch.setattr("detox_ray.loop.guard_app", guarded.append)
    monkeypatch.setattr("detox_ray.cluster.started_here", lambda: False)
    tuning = fine_tune(load_sft_config(folder / "sft.yaml"), quiet=True)
    assert tuning["dev_loss"] < tuning["dev_loss_before"]
    evaluation = train(load_config(folder / "train.yaml"), quiet=True)
    assert capsys.readouterr().out == ""
    assert len(guarded) == 1
    assert evaluation == json.loads((folder / "run" / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(line["logprob_gap_max"] < 1e-3 for line in lines)
    assert abs(lines[0]["kl"]) < 1e-3 < abs(lines[1]["kl"])
    assert list(evaluation["systems"]) == ["base", "fine-tuned", "tuned"]
    # Of 120 dialogues and 40 texts a quarter is toxic.
    assert evaluation["splits"] == {"all": 8, "toxic": 2, "referenced": 6}
    for system in evaluation["systems"].values():
        assert system["all"].keys() >= {"rouge1", "rougeL", "perplexity"}
    assert evaluation["baselines"]["lead-1"]["all"]["rouge1"]["value"] > 0.3
    assert "Lead-1" in (folder / "run" / "report.md").read_text()
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = base(input_ids=ids, labels=ids).logits
        after = PeftModel.from_pretrained(base, folder / "run" / "adapter")(input_ids=ids, labels=ids).logits
    assert (after - before).abs().max() > 1e-2
