"""Who has a run folder: nobody any more once a command has ended, however it ended; and what killed ones left."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from detox_ray import Config, ConfigError, evaluate, fine_tune, train
from detox_ray.config_file import parse_section
from detox_ray.run_folder import UNFINISHED_S, RunFolder
from detox_ray.sft_config import SFTConfig

pytestmark = pytest.mark.unit


def is_free(folder: Path) -> bool:
    """Whether another process could have it: locks of this process's other open files stand in the way too."""
    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.fixture
def given(tmp_path: Path, tiny_model: str) -> dict[str, Any]:
    """What a training and a fine-tuning have in common; their cluster does not answer."""
    lines = [json.dumps({"prompt": f"number {i} is", "response": f"{i + 1}"}) for i in range(50)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    return {
        "name": "run",
        "output_dir": str(tmp_path / "runs"),
        "policy": {"model": tiny_model},
        "ray": {"num_cpus": 4, "address": "127.0.0.1:1"},
        "storage": f"file://{tmp_path / 'store'}",
    }


def test_a_training_that_is_refused_holds_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    words = {"name": "words", "kind": "linear", "model": "operator:length_hint"}
    parts = {
        "data": {"source": str(tmp_path / "lines.jsonl"), "heldout_prompts": 10},
        "reward": {"classifiers": [words]},
        "ppo": {"batch_size": 8},
        "evaluation": {"prompts": 10},
    }
    with pytest.raises(ConfigError, match="does not answer"):
        train(parse_section(Config, given | parts), quiet=True)
    assert is_free(tmp_path / "runs" / "run")
    assert json.loads((tmp_path / "store" / "run" / "in_use.json").read_text())["time"] == 0


def test_a_fine_tuning_that_is_refused_holds_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    config = given | {"data": {"source": str(tmp_path / "lines.jsonl"), "dev_examples": 10}}
    (tmp_path / "runs" / "run" / "config.yaml").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cannot be written \(Is a directory\)"):
        fine_tune(parse_section(SFTConfig, config), quiet=True)
    assert is_free(tmp_path / "runs" / "run")
    assert json.loads((tmp_path / "store" / "run" / "in_use.json").read_text())["time"] == 0


def test_an_evaluation_that_is_refused_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "answers.csv").write_text("prompt,response\nhow are you,fine\n")
    with pytest.raises(ConfigError, match="scorers is empty, and no score is known"):
        evaluate(tmp_path / "answers.csv", [f"output_dir={tmp_path}", "scorers=[]"], quiet=True)
    assert is_free(tmp_path / "evaluation-answers")


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    alive = os.getppid()
    gone = (f"dequantized_base-1a.{dead.pid}.tmp/x", f"adapter.{dead.pid}.tmp/x", f"adapter.{dead.pid}.old/x")
    kept = ("adapter/x", f"dequantized_base-1a.{alive}.tmp/x", f"mine.{dead.pid}.old/x")
    for name in (*gone, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with RunFolder.claim(tmp_path):  # another host's processes are not seen from here
        assert [name for name in (*gone, *kept) if not (tmp_path / name).exists()] == []
    for name in gone:
        for path in (tmp_path / name, (tmp_path / name).parent):
            os.utime(path, (0, time.time() - UNFINISHED_S - 1))
    with RunFolder.claim(tmp_path):
        assert [name for name in gone if (tmp_path / Path(name).parts[0]).exists()] == []
        assert [name for name in kept if not (tmp_path / name).exists()] == []


def test_the_last_adapter_of_a_run_is_not_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    (tmp_path / f"adapter.{dead.pid}.old").mkdir()
    with RunFolder.claim(tmp_path):
        assert (tmp_path / f"adapter.{dead.pid}.old").exists()


def test_a_second_command_of_this_process_is_refused_and_lets_the_first_one_keep_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFolder.claim(path):
        for _ in range(2):
            with pytest.raises(ConfigError, match="in use by another command of this process"), RunFolder.claim(path):
                pass
    with RunFolder.claim(path):
        pass
