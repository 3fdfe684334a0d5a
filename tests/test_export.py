"""Exports load in plain `transformers` and `peft` and compute what the run measured."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from detox_ray.config import Config
from detox_ray.config_file import dump_config, parse_config
from detox_ray.errors import ConfigError
from detox_ray.export import export, push_to_hub
from detox_ray.policy.adapter import save_adapter
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import collate
from detox_ray.run_folder import RunFolder

pytestmark = pytest.mark.unit
PROMPT, RESPONSE = torch.arange(5, 12).numpy(), torch.arange(20, 40).numpy()


def config_of(model: str, quantization: str) -> Config:
    classifier = {"name": "words", "kind": "linear", "model": "some.module:function"}
    policy = {"model": model, "quantization": quantization, "lora": {"rank": 4}}
    return parse_config({"policy": policy, "reward": {"classifiers": [classifier]}})


def run_with_adapter(folder: Path, model: str, quantization: str) -> torch.Tensor:
    """Makes a run with a random adapter; returns its policy's log-probabilities of RESPONSE."""
    config = config_of(model, quantization)
    policy = Policy(config.policy, torch.device("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    save_adapter(policy.adapter(0), RunFolder(folder).adapter)
    with torch.no_grad():
        return policy(collate([PROMPT], [RESPONSE], 1)).logprobs[0]


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    """Those of RESPONSE after PROMPT by a plain model."""
    ids = torch.cat([torch.from_numpy(PROMPT), torch.from_numpy(RESPONSE)])
    with torch.no_grad():
        found = model.eval()(input_ids=ids[None]).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
    return found.gather(1, ids[len(PROMPT) :, None])[:, 0]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_merged_model_is_the_trained_policy(tiny_model: str, tmp_path: Path, quantization: str) -> None:
    expected = run_with_adapter(tmp_path / "run", tiny_model, quantization)
    folder = export(tmp_path / "run", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logprobs(model), expected, atol=1e-4)
    assert not torch.allclose(logprobs(AutoModelForCausalLM.from_pretrained(tiny_model)), expected, atol=0.1)
    assert not list(folder.glob("*.bin"))
    assert AutoTokenizer.from_pretrained(folder).decode([5, 6]) == AutoTokenizer.from_pretrained(tiny_model).decode(
        [5, 6]
    )
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0


def test_the_original_base_and_another_precision(tiny_model: str, tmp_path: Path) -> None:
    expected = run_with_adapter(tmp_path / "run", tiny_model, "nf4")
    folder = export(tmp_path / "run", tmp_path / "model", base="original", dtype="bfloat16")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118 - no iterator
    original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "run" / "adapter")
    found = logprobs(AutoModelForCausalLM.from_pretrained(folder))
    assert (found - logprobs(original)).abs().mean() < 0.1
    assert (found - expected).abs().mean() > 0.2


def test_an_adapter_loads_with_peft(tiny_model: str, tmp_path: Path) -> None:
    expected = run_with_adapter(tmp_path / "run", tiny_model, "none")
    folder = export(tmp_path / "run", tmp_path / "adapter", form="adapter", repository="someone/kind-model")
    assert '), "someone/kind-model")' in (folder / "README.md").read_text()
    assert str(Path(tiny_model).parent) not in (folder / "adapter_config.json").read_text()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    assert torch.allclose(logprobs(model), expected, atol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_encoder_decoder_is_exported_as_one(tiny_t5: str, tmp_path: Path, quantization: str) -> None:
    expected = run_with_adapter(tmp_path / "run", tiny_t5, quantization)
    merged = export(tmp_path / "run", tmp_path / "model")
    models = [AutoModelForSeq2SeqLM.from_pretrained(merged)]
    if quantization == "none":
        adapter = export(tmp_path / "run", tmp_path / "adapter", form="adapter")
        models.append(PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(tiny_t5), adapter))
    prompt, response = (torch.from_numpy(ids)[None] for ids in (PROMPT, RESPONSE))
    for model in models:
        with torch.no_grad():
            found = model.eval()(input_ids=prompt, labels=response).logits[0].log_softmax(-1)
        assert torch.allclose(found.gather(1, response[0, :, None])[:, 0], expected, atol=1e-4)
    card = (merged / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text2text-generation"


def test_the_card_says_what_it_is_and_what_is_known(tiny_model: str, tmp_path: Path) -> None:
    run_with_adapter(tmp_path / "run", tiny_model, "none")
    bare = (export(tmp_path / "run", tmp_path / "bare", form="adapter") / "README.md").read_text()
    header = yaml.safe_load(bare.split("---")[1])
    assert header["base_model"] == Path(tiny_model).name
    assert header["library_name"] == "peft"
    assert "Not evaluated" in bare
    assert str(tmp_path) not in bare
    (tmp_path / "run" / "model_card.md").write_text("## Toxicity\n\nThe evidence.\n")
    assert "The evidence." in (export(tmp_path / "run", tmp_path / "full") / "README.md").read_text()


def test_the_card_names_the_pinned_revision(tiny_model: str, tmp_path: Path) -> None:
    run_with_adapter(tmp_path / "run", tiny_model, "none")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["policy"]["revision"] = "v1"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    card = (export(tmp_path / "run", tmp_path / "adapter", form="adapter") / "README.md").read_text()
    assert f'from_pretrained("{Path(tiny_model).name}", revision="v1"), "run")' in card


def test_what_cannot_be_exported(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        export(tmp_path / "nothing", tmp_path / "out")
    run_with_adapter(tmp_path / "run", tiny_model, "none")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        export(tmp_path / "run", tmp_path / "taken")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no adapter yet"):
        export(tmp_path / "run", tmp_path / "out")


def test_a_hub_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"--push-to-hub someone/model: .*set HF_TOKEN"):
        push_to_hub(tmp_path, "someone/model", public=False)
    with pytest.raises(ConfigError, match=r"--push-to-hub not a name"):
        push_to_hub(tmp_path, "not a name", public=False)


def test_an_export_is_uploaded_whole_and_private_with_the_token(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_adapter(tmp_path / "run", tiny_model, "none")
    exported = export(tmp_path / "run", tmp_path / "out")
    hub = HubServer({}, "hf_of_a_test", uploads=tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    try:
        for name, public in (("someone/model", False), ("someone/public", True), ("someone/model", False)):
            assert push_to_hub(exported, name, public) == f"{hub.address}/{name}"
            found = {p.relative_to(tmp_path / "hub" / name): p.read_bytes() for p in files_of(tmp_path / "hub" / name)}
            assert found == {p.relative_to(exported): p.read_bytes() for p in files_of(exported)}
        assert hub.private == {"someone/model"}
        monkeypatch.setenv("HF_TOKEN", "hf_of_another")
        with pytest.raises(ConfigError, match=r"--push-to-hub someone/model: .*set HF_TOKEN to a token that may write"):
            push_to_hub(exported, "someone/model", public=False)
    finally:
        hub.stop()


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
