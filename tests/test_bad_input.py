"""What a user can get wrong: one line with the value and the fix, exit code 2, before anything expensive starts."""

import errno
import json
import shutil
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from detox_ray import cli
from detox_ray.errors import ConfigError
from detox_ray.rollout import engine
from detox_ray.run_folder import check_usable

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("without_ray")]
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, tiny_model: str, refused_line: Refused) -> Refused:
    """Run `detox-ray train` on a small valid configuration with overrides; returns the one line it is refused with."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {i} is"}) + "\n" for i in range(50)))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
name: run
output_dir: {tmp_path / "runs"}
data: {{source: {prompts}, heldout_prompts: 10}}
policy: {{model: {tiny_model}}}
reward: {{classifiers: [{{name: words, kind: linear, model: "operator:length_hint"}}]}}
ppo: {{batch_size: 8}}
evaluation: {{prompts: 10}}
ray: {{num_cpus: 4}}
"""
    )

    return partial(refused_line, "train", str(config))


def test_prompt_file(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere.jsonl" in refused(f"data.source={tmp_path}/nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refused(f"data.source={tmp_path}/empty.jsonl")
    error = refused("data.text_column=question")
    assert "question" in error
    assert "prompt" in error


@pytest.mark.parametrize("path", [f"{'x' * 300}.jsonl", "~no-such-user/x.jsonl"])
@pytest.mark.parametrize("key", ["data.source", "policy.model", "policy.adapter", "reward.classifiers.0.model"])
def test_a_path_that_cannot_be(refused: Refused, key: str, path: str) -> None:
    assert f"{path!r} cannot be read (" in refused(f"{key}={path}")


def test_a_run_folder_that_cannot_be(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "x" * 300
    assert f"{name}/run cannot be written (File name too long)" in refused(f"output_dir={tmp_path / name}")

    def closed(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("detox_ray.run_folder.Path.stat", closed)  # which root never meets
    with pytest.raises(ConfigError, match=r"^output_dir: /root/runs cannot be written \(Permission denied\)$"):
        check_usable(Path("/root/runs"))


def test_tokenizer_without_pad_token(refused: Refused, tiny_model: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "no-pad")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.exists():
            settings = json.loads(path.read_text())
            settings.pop("pad_token", None)
            path.write_text(json.dumps(settings))
    assert "has no pad token; set one, such as policy.pad_token='<eos>'" in refused(f"policy.model={folder}")


def test_model_and_adapter(refused: Refused, tmp_path: Path) -> None:
    assert "no such folder" in refused(f"policy.model={tmp_path}/nowhere")
    assert "cannot be read" in refused(f"policy.adapter={tmp_path}")
    assert "policy.lora.targets=['nonsense']" in refused("policy.lora.targets=[nonsense]")


def test_adapter_of_another_base(refused: Refused, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from detox_ray.config import PolicyConfig
    from detox_ray.policy.adapter import save_adapter
    from detox_ray.policy.policy import Policy

    other = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    policy = Policy(PolicyConfig(model=str(tmp_path / "other"), quantization="none"), torch.device("cpu"))
    save_adapter(policy.adapter(0), tmp_path / "adapter")
    assert "does not fit the base model" in refused(f"policy.adapter={tmp_path / 'adapter'}")


def test_classifiers(refused: Refused, tiny_model: str) -> None:
    error = refused("reward.classifiers.0.model=profanity_check:predict_prob")
    assert "also in the reward" in error
    assert "nonsense" in refused("reward.classifiers.0.model=nonsense.module:function")
    assert "nowhere" in refused("evaluation.judge={name: j, kind: transformers, model: /nowhere}")


def test_classifier_label(refused: Refused, shared: Path) -> None:
    model = shared / "models" / "minilm-toxicity"
    error = refused(
        "reward.classifiers.0.kind=transformers",
        f"reward.classifiers.0.model={model}",
        "reward.classifiers.0.label=hateful",
    )
    assert "hateful" in error
    assert "neutral" in error


def test_more_workers_than_cpus(refused: Refused) -> None:
    assert "lower rollout.workers" in refused("rollout.workers=40")


def test_the_callers_own_ray_is_not_measured_by_this_machine(
    refused: Refused, refused_line: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: str
) -> None:
    given = ("rollout.workers=400", f"data.source={tmp_path}/nowhere.jsonl")
    evaluate = partial(refused_line, "evaluate", tiny_model, f"output_dir={tmp_path}", "scorers=[]")
    assert "lower rollout.workers" in evaluate(*given)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    assert "nowhere.jsonl' does not exist" in refused(*given)
    assert "nowhere.jsonl' does not exist" in evaluate(*given)


def test_no_vllm(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_why_not_vllm", lambda architecture, num_gpus: engine.NOT_INSTALLED)
    assert "vLLM is not installed; install" in refused("rollout.engine=vllm")


def test_no_compiler(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler here; install it" in refused("train.compile=true")


def test_a_ray_address_that_does_not_answer(refused: Refused) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "does not answer" in refused(f"ray.address=127.0.0.1:{port}")


def test_a_service_at_an_address_that_is_none(refused_line: Refused) -> None:
    assert "ray.address=nonsense does not answer (" in refused_line("serve", "ray.address=nonsense")


def test_prompts_that_do_not_fit_the_model(refused: Refused) -> None:
    assert "512 positions" in refused("data.max_tokens=600")


def test_parts_of_a_model_that_do_not_come_out_even(refused: Refused) -> None:
    assert "rollout.tensor_parallel=3 does not divide the 2 attention heads" in refused("rollout.tensor_parallel=3")
    assert "needs rollout.num_gpus=2 (or 0, on CPUs), not 1" in refused(
        "rollout.tensor_parallel=2", "rollout.num_gpus=1"
    )
    assert "rollout.tensor_parallel=2 needs the vllm engine" in refused(
        "rollout.tensor_parallel=2", "rollout.engine=transformers"
    )


def test_storage(refused: Refused) -> None:
    assert "storage='nowhere://x' is no address that pyarrow or fsspec can open" in refused("storage=nowhere://x")


def test_storage_with_another_run(refused: Refused, tmp_path: Path) -> None:
    nowhere = ("rollout.engine=transformers", "ray.address=127.0.0.1:1", f"storage=file://{tmp_path / 'store'}")
    refused(*nowhere)
    checkpoint = tmp_path / "store" / "run" / "checkpoints" / "checkpoint_3" / "manifest.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text('{"step": 3}')
    shutil.copy(tmp_path / "runs" / "run" / "config.yaml", tmp_path / "store" / "run")
    elsewhere = (f"output_dir={tmp_path / 'elsewhere'}", "ppo.learning_rate=0.25")
    error = refused(*nowhere, *elsewhere)
    assert "store/run holds a run with ppo.learning_rate = " in error
    assert "not 0.25; choose another name=" in error
    assert checkpoint.exists()
    assert not (tmp_path / "elsewhere" / "run" / "checkpoints").exists()


def test_a_folder_with_another_run(refused: Refused, tmp_path: Path) -> None:
    nowhere = ("rollout.engine=transformers", "ray.address=127.0.0.1:1")
    refused(*nowhere)
    # Nothing was trained yet: the corrected command is not refused for what the first one said.
    assert "does not answer" in refused(*nowhere, "ppo.learning_rate=0.5")
    (tmp_path / "runs" / "run" / "checkpoints").mkdir()
    error = refused(*nowhere, "ppo.learning_rate=0.25")
    assert "holds a run with ppo.learning_rate = 0.5, not 0.25" in error
    assert "does not answer" in refused(*nowhere, "ppo.learning_rate=0.5", "rollout.timeout_s=7", "train.threads=2")


@pytest.mark.parametrize("left", ["checkpoints/x", "adapter/x", "evaluation.json", "fine_tuning.json"])
def test_results_do_not_get_another_configuration(refused: Refused, tmp_path: Path, left: str) -> None:
    """Also those whose checkpoints were removed for their space."""
    nowhere = ("rollout.engine=transformers", "ray.address=127.0.0.1:1")
    refused(*nowhere)
    before = (tmp_path / "runs" / "run" / "config.yaml").read_text()
    result = tmp_path / "runs" / "run" / left
    result.parent.mkdir(exist_ok=True)
    result.write_text("{}")
    assert "holds a run with ppo.learning_rate" in refused(*nowhere, "ppo.learning_rate=0.25")
    assert (tmp_path / "runs" / "run" / "config.yaml").read_text() == before


def test_inputs_that_are_in_another_place_now(refused: Refused, tmp_path: Path) -> None:
    nowhere = ("rollout.engine=transformers", "ray.address=127.0.0.1:1")
    lines = "".join(f"a prompt of its own, number {i}\n" for i in range(40))
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "prompts.txt").write_text(lines)
    before, after = (f"data.source={tmp_path / folder / 'prompts.txt'}" for folder in ("before", "after"))
    few = ("data.heldout_prompts=4", "evaluation.prompts=4", "ppo.batch_size=8", "data.max_tokens=48")
    assert "does not answer" in refused(*nowhere, *few, before)
    (tmp_path / "runs" / "run" / "checkpoints").mkdir()
    assert "holds a run with data.source" in refused(*nowhere, *few, after)
    (tmp_path / "before" / "prompts.txt").unlink()
    assert "does not answer" in refused(*nowhere, *few, after)


def test_evaluate_without_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["detox-ray", "evaluate", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "is neither a run folder (no config.yaml) nor a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--workers", "many", "text"], "Invalid value for '--workers'"),
        (["score", "--workers", "-1", "text"], "Invalid value for '--workers'"),
        (["plan", "--gpu-memory-gib", "-1", "run.yaml"], "Invalid value for '--gpu-memory-gib'"),
        (["chat", "--seed", str(2**64), "run"], "Invalid value for '--seed'"),
        (["calibrate", "texts.csv", "--method", "guess"], "Invalid value for '--method'"),
        (["train"], "Missing argument"),
        (["train", "--config", "x"], "No such option: --config"),
    ],
)
def test_wrong_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["detox-ray", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("detox_ray.cli.load_config", interrupt)
    monkeypatch.setattr(sys, "argv", ["detox-ray", "train", "configs/laptop.yaml"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130
    assert "continues with the same command" in " ".join(capsys.readouterr().err.split())


def test_no_command_shows_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["detox-ray"])
    with pytest.raises(SystemExit):
        cli.main()
    captured = capsys.readouterr()
    assert "calibrate" in captured.out + captured.err
