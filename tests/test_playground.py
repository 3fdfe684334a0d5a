"""What the playground says of a run, and what it refuses before anything starts."""

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from detox_ray import playground
from detox_ray.config import Config
from detox_ray.data.learned import write_learned
from detox_ray.metrics_file import STEPS_FILE
from detox_ray.playground import offered_prompts, page_setup
from detox_ray.run_adapters import named_adapters
from detox_ray.run_folder import RunFolder

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path: Path, tiny_model: str) -> RunFolder:
    """A run that was started and has no adapter yet."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": {"text": f"number {i} is", "toxicity": None if i % 5 == 0 else i / 50}} for i in range(50)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "name": "run",
        "output_dir": str(tmp_path),
        "data": {"source": str(prompts), "heldout_prompts": 20},
        "policy": {"model": tiny_model, "quantization": "none"},
        "reward": {"classifiers": [{"name": "words", "kind": "linear", "model": "operator:length_hint"}]},
        "evaluation": {"prompts": 10},
        "train": {"total_steps": 40},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return RunFolder(folder)


@pytest.fixture
def refused(refused_line: Callable[..., str]) -> Callable[..., str]:
    """Run `detox-ray playground`; returns the one line it is refused with."""
    return partial(refused_line, "playground")


def test_a_folder_without_run(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"{tmp_path} is no run folder" in refused(str(tmp_path))


def test_a_fine_tuning_is_for_the_terminal(refused: Callable[..., str], run: RunFolder) -> None:
    run.config_file.write_text("name: run\ntrain: {epochs: 1}\n")
    assert f"talk to it with detox-ray chat {run.path}" in refused(str(run.path))


def test_gradio_is_missing(refused: Callable[..., str], run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(playground, "find_spec", lambda name: None if name == "gradio" else found(name))
    assert "pip install 'detox_ray[playground]'" in refused(str(run.path))


def test_prompts_that_cannot_be_read(refused: Callable[..., str], run: RunFolder, tmp_path: Path) -> None:
    assert "nowhere.jsonl" in refused(str(run.path), "--prompts", f"{tmp_path}/nowhere.jsonl")
    (tmp_path / "other.csv").write_text("question\nhow are you\n")
    error = refused(str(run.path), "--prompts", f"{tmp_path}/other.csv")
    assert "'prompt' is not in record 1" in error
    assert "question" in error


def test_an_adapter_of_another_run(refused: Callable[..., str], run: RunFolder) -> None:
    run.adapter.mkdir()
    assert "cannot be read" in refused(str(run.path))


def test_a_port_that_is_none(refused: Callable[..., str], run: RunFolder) -> None:
    assert "port = 70000" in refused(str(run.path), "--port", "70000")


def test_a_run_without_adapter_is_the_base_alone_and_says_so(run: RunFolder) -> None:
    config = run.read_config(Config)
    assert named_adapters(run, config) == {}
    setup = page_setup(run, config, [], [])
    assert [system.name for system in setup.systems] == ["Base"]
    assert setup.missing is not None
    assert "no adapter yet" in setup.missing.what
    assert setup.missing.command == f"detox-ray train {run.config_file}"


def test_a_run_under_way_says_how_far_it_is_and_a_finished_one_nothing(run: RunFolder, tmp_path: Path) -> None:
    run.adapter.mkdir()
    config = run.read_config(Config)
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"adapter": str(tmp_path / "sft")})})
    assert named_adapters(run, config) == {"Fine-tuned": tmp_path / "sft", "RLAF": run.adapter}
    (run.adapter / STEPS_FILE).write_text("30")
    setup = page_setup(run, config, ["Fine-tuned", "RLAF"], [])
    assert setup.missing is not None
    assert "30 of 40 steps" in setup.missing.what
    assert [(s.name, s.compared) for s in setup.systems] == [
        ("Base", "RLAF / base"),
        ("Fine-tuned", "Fine-tuned / base"),
        ("RLAF", "RLAF / base"),
    ]
    (run.adapter / STEPS_FILE).write_text("40")
    assert page_setup(run, config, ["Fine-tuned", "RLAF"], []).missing is None
    assert [(s.name, s.in_reward) for s in setup.scorers] == [("alt-profanity-check", False), ("words", True)]


def test_the_prompts_offered_are_held_out_with_their_files_toxicity(run: RunFolder, tmp_path: Path) -> None:
    config = run.read_config(Config)
    prompts = offered_prompts(run, config, None, None)
    assert len(prompts) == 20
    for prompt in prompts:
        number = int(prompt.text.split()[1])
        assert prompt.toxicity == (None if number % 5 == 0 else number / 50)
    write_learned(run.path, [f"number {i} is" for i in range(30)], ())
    assert {int(p.text.split()[1]) for p in offered_prompts(run, config, None, None)} == {*range(30, 50)}
    other = tmp_path / "other.csv"
    other.write_text("question,toxicity\nhow are you,0.25\nwho are you,25%\n")
    assert {(p.text, p.toxicity) for p in offered_prompts(run, config, other, "question")} == {
        ("how are you", 0.25),
        ("who are you", None),
    }
