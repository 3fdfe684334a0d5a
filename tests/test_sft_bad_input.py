"""What a user can get wrong in a fine-tuning: one line with the value and the fix, exit code 2, before Ray starts."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from detox_ray import cli
from detox_ray.config import PolicyConfig
from detox_ray.policy.adapter import Adapter, save_adapter
from detox_ray.policy.policy import Policy

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("without_ray")]
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, tiny_model: str, refused_line: Refused) -> Refused:
    """Run `detox-ray sft` on a small valid configuration with overrides; returns the one line it is refused with."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"number {i}", "response": f"{i + 1}"}) + "\n" for i in range(50)))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
name: run
output_dir: {tmp_path / "runs"}
data: {{source: {pairs}, dev_examples: 10}}
policy: {{model: {tiny_model}}}
ray: {{num_cpus: 4, address: "127.0.0.1:1"}}
"""
    )

    return partial(refused_line, "sft", str(config))


def test_the_configuration_itself_is_fine(refused: Refused) -> None:
    assert "ray.address=127.0.0.1:1 does not answer" in refused()


def test_examples(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere.csv does not exist" in refused(f"data.source={tmp_path}/nowhere.csv")
    assert "has no column 'question'; its columns are prompt, response" in refused("data.prompt_column=question")
    error = refused("data.dev_examples=50")
    assert "0 examples to train on and 50 for the dev loss are left of 50" in error
    assert "lower data.dev_examples=50" in error
    assert "response longer than data.max_tokens" in refused("data.max_tokens=2")
    broken = tmp_path / "dialogues.csv"
    broken.write_text("text,dialogue_id,turn_id,type\nyou fool,1,0,HS\nyou fool,1,1,HS\n")
    assert "1 dialogue whose turns do not alternate" in refused(f"data.source={broken}")


def test_the_callers_own_ray_is_not_measured_by_this_machine(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("ray.address=null", "train.workers=32", "data.source=nowhere.csv")
    assert "lower train.workers" in refused(*given)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    assert "nowhere.csv does not exist" in refused(*given)


def test_template(refused: Refused) -> None:
    assert "template 'Human: ' has no {prompt}" in refused("data.template='Human: '")
    assert "has no chat template; write one" in refused("data.template=chat")


def test_more_tokens_than_the_model_reads(refused: Refused) -> None:
    assert "data.max_tokens=600 exceeds the 512 positions" in refused("data.max_tokens=600")


def test_targets_that_are_not_there(refused: Refused) -> None:
    error = refused("policy.lora.targets=[q_proj, query_key_value]")
    assert "the model has no module 'query_key_value'" in error
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in error


def test_quantisation_where_there_is_none(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detox_ray.policy.load.is_bitsandbytes_available", lambda: False)
    error = refused("policy.quantization=int8")
    assert "policy.quantization=int8 needs bitsandbytes, which is not installed here; set" in error
    assert "does not answer" in refused("policy.quantization=none")


def test_adapter_of_another_base(refused: Refused, tmp_path: Path) -> None:
    other = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    policy = Policy(PolicyConfig(model=str(tmp_path / "other"), quantization="none"), torch.device("cpu"))
    save_adapter(policy.adapter(0), tmp_path / "adapter")
    assert "does not fit the base model" in refused(f"policy.adapter={tmp_path / 'adapter'}")


def test_a_tokenizer_without_end_token(refused: Refused, tiny_model: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "endless")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").unlink()
    assert "has no end token, so no response could end" in refused(f"policy.model={folder}")


def test_learners(refused: Refused) -> None:
    assert "train.batch_size=32 is not a multiple of train.workers=3" in refused("train.workers=3")
    local = ("ray.address=null",)
    assert "this needs 40 CPUs (40 x learner with 1)" in refused(*local, "train.workers=40", "train.batch_size=40")


def test_a_folder_with_another_run(refused: Refused, tmp_path: Path) -> None:
    refused()
    (tmp_path / "runs" / "run" / "checkpoints").mkdir()
    assert "holds a run with data.template = 'auto', not 'none'" in refused("data.template=none")
    assert "does not answer" in refused("train.threads=2", "train.max_failures=0")


def test_its_folder_is_none_of_a_detoxification(refused: Refused, refused_line: Refused, tmp_path: Path) -> None:
    refused()
    (tmp_path / "runs" / "run" / "checkpoints").mkdir()
    words = "{name: words, kind: linear, model: 'operator:length_hint'}"
    given = (f"output_dir={tmp_path / 'runs'}", "name=run", f"data.source={tmp_path / 'pairs.jsonl'}")
    few = ("data.heldout_prompts=10", "evaluation.prompts=10", "ppo.batch_size=8", "ppo.minibatches=1")
    error = refused_line("train", "configs/laptop.yaml", f"reward.classifiers=[{words}]", *given, *few)
    assert "holds a fine-tuning run (detox-ray sft), and this needs a detoxification run (detox-ray train)" in error
    assert f"go on from policy.adapter={tmp_path / 'runs' / 'run' / 'adapter'}" in error


def test_a_complete_run_is_not_run_again(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused()
    (tmp_path / "runs" / "run" / "fine_tuning.json").write_text("{}")
    assert "does not answer" in refused()  # without its adapter it goes on
    save_adapter(Adapter(0, "", {}, {}), tmp_path / "runs" / "run" / "adapter")
    monkeypatch.setattr(sys, "argv", ["detox-ray", "sft", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert "is complete; remove it to run again" in capsys.readouterr().out
