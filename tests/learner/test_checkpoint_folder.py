"""Checkpoints and the run's adapter after what disks and kills do to files."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from detox_ray.errors import ModelError, RewardError, StorageError, storage_error
from detox_ray.learner.checkpoint_folder import (
    RAY_LIST_FILE,
    is_kept,
    keep_adapter,
    last_whole_checkpoint,
    read_checkpoint,
    remove_unlisted,
    remove_wrong_list,
    write_checkpoint,
)
from detox_ray.learner.checkpoints import leave_failure, save_checkpoint
from detox_ray.policy.adapter import Adapter, content_digest, load_adapter
from detox_ray.run_folder import RunFolder

pytestmark = pytest.mark.unit


def adapter_of(step: int) -> Adapter:
    config, tensors = {"r": 2}, {"a.lora_A.weight": np.full((2, 3), step, np.float32)}
    return Adapter(step, content_digest(config, tensors), config, tensors)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Those after steps 3 and 5; the names do not tell which is newer."""
    for name, step in (("checkpoint_b", 3), ("checkpoint_a", 5)):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, step, adapter_of(step), {"moments": torch.full((4,), float(step))})
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_the_newest_is_read_as_it_was_written(checkpoints: Path) -> None:
    found = last_whole_checkpoint(checkpoints)
    assert found == (5, checkpoints / "checkpoint_a")
    adapter, state = read_checkpoint(found[1])
    assert adapter.digest == adapter_of(5).digest
    assert torch.equal(state["moments"], torch.full((4,), 5.0))


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("file", ["learner.pt", "manifest.json", "adapter/adapter_model.safetensors"])
def test_a_damaged_one_is_left_out_for_the_one_before(
    checkpoints: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(checkpoints / "checkpoint_a" / file)
    assert last_whole_checkpoint(checkpoints) == (3, checkpoints / "checkpoint_b")


def write_list_of_ray(folder: Path, *names: str) -> None:
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    (folder / RAY_LIST_FILE).write_text(json.dumps({"checkpoint_results": results}))


def test_without_any_whole_one_nothing_is_trained_anew_in_silence(checkpoints: Path) -> None:
    for name in "ab":
        cut(checkpoints / f"checkpoint_{name}" / "learner.pt")
    write_list_of_ray(checkpoints, "checkpoint_b", "checkpoint_a")
    with pytest.raises(StorageError, match="all 2 checkpoints"):
        last_whole_checkpoint(checkpoints)
    assert last_whole_checkpoint(checkpoints / "nowhere") is None


def test_the_first_one_that_a_kill_cut_short_is_as_if_it_had_not_been_begun(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_a").mkdir()
    (tmp_path / "checkpoint_a" / "learner.pt").write_bytes(b"half")
    assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize("listed", [["checkpoint_a", "checkpoint_b"], ["checkpoint_b", "checkpoint_c"], None])
def test_the_list_of_ray_is_kept_unless_ray_would_not_start_with_it(
    checkpoints: Path, listed: list[str] | None
) -> None:
    if listed is None:
        (checkpoints / RAY_LIST_FILE).write_text('{"checkpoint_res')
    else:
        write_list_of_ray(checkpoints, *listed)
    remove_wrong_list(checkpoints)
    assert (checkpoints / RAY_LIST_FILE).exists() == (listed == ["checkpoint_a", "checkpoint_b"])
    remove_wrong_list(checkpoints / "nowhere")


def folders(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("checkpoint_*/"))


def test_what_ray_does_not_know_is_removed_but_the_newest_whole_one(checkpoints: Path) -> None:
    for name, step in (("checkpoint_c", 1), ("checkpoint_d", 6), ("checkpoint_e", 7)):
        (checkpoints / name).mkdir()
        write_checkpoint(checkpoints / name, step, adapter_of(step), {})
    cut(checkpoints / "checkpoint_e" / "learner.pt")
    write_list_of_ray(checkpoints, "checkpoint_b", "checkpoint_a")
    remove_unlisted(checkpoints)
    assert folders(checkpoints) == ["checkpoint_a", "checkpoint_b", "checkpoint_d"]
    assert last_whole_checkpoint(checkpoints) == (6, checkpoints / "checkpoint_d")


@pytest.mark.parametrize("listed", ["[]", '["a", "gone"]', '["damaged"]', None, "torn"])
def test_a_list_that_may_be_wrong_removes_nothing(checkpoints: Path, listed: str | None) -> None:
    (checkpoints / "checkpoint_damaged").mkdir()
    if listed == "torn":
        (checkpoints / RAY_LIST_FILE).write_text('{"checkpoint_res')
    elif listed is not None:
        write_list_of_ray(checkpoints, *(f"checkpoint_{name}" for name in json.loads(listed)))
    remove_unlisted(checkpoints)
    assert folders(checkpoints) == ["checkpoint_a", "checkpoint_b", "checkpoint_damaged"]
    remove_unlisted(checkpoints / "nowhere")


def test_a_changed_adapter_is_noticed(tmp_path: Path) -> None:
    adapter = adapter_of(1)
    keep_adapter(adapter, tmp_path, steps=1)
    keep_adapter(adapter_of(2), tmp_path, steps=2)
    assert is_kept(adapter_of(2), tmp_path)
    assert not is_kept(adapter, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert not is_kept(adapter_of(2), tmp_path)
    with pytest.raises(ModelError, match="damaged"):
        load_adapter(tmp_path / "adapter")


def test_what_a_killed_process_of_the_same_number_was_replacing_is_no_obstacle(tmp_path: Path) -> None:
    keep_adapter(adapter_of(1), tmp_path, steps=1)
    (tmp_path / f"adapter.{os.getpid()}.old" / "adapter").mkdir(parents=True)
    keep_adapter(adapter_of(2), tmp_path, steps=2)
    assert is_kept(adapter_of(2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "learner.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_checkpoint(tmp_path, 0, adapter_of(0), {"moments": torch.zeros(100_000)})
    problem = storage_error(caught.value)
    assert "(No space left on device); make room" in str(problem)
    assert "\n" not in str(problem)
    assert not (tmp_path / "manifest.json").exists()
    assert storage_error(OSError(errno.ENOENT, "gone")) is None


def test_a_checkpoint_is_written_nowhere_but_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []
    monkeypatch.setattr("ray.train.report", lambda metrics, checkpoint, **_: reported.append(checkpoint.path))
    monkeypatch.setattr("tempfile.tempdir", "/dev/null")
    learner: Any = SimpleNamespace(policy=SimpleNamespace(adapter=lambda: adapter_of(7)), state=lambda: {"step": 7})
    for _ in range(2):
        save_checkpoint(learner, 7, {}, tmp_path)
    assert sorted(Path(path) for path in reported) == sorted(tmp_path.iterdir())
    assert len(reported) == 2  # that of a step which is run again does not replace the one before
    step, folder = last_whole_checkpoint(tmp_path) or (None, tmp_path)
    assert step == 7
    assert read_checkpoint(folder)[1] == {"step": 7}


def test_a_failure_that_is_known_is_not_met_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise RewardError("the classifier is lost")

    for _ in range(2):
        leave_failure(tmp_path, fail)
    assert calls == [1]
    with pytest.raises(RewardError, match="the classifier is lost"):
        RunFolder(tmp_path).raise_failure()
