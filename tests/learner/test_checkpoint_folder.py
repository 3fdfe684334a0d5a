"""Checkpoints and the run's adapter after what disks and kills do to files."""

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from detox_ray.errors import ModelError, StorageError, storage_error
from detox_ray.learner.checkpoint_folder import (
    is_kept,
    keep_adapter,
    last_whole_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from detox_ray.policy.adapter import Adapter, content_digest, load_adapter

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


def test_without_any_whole_one_nothing_is_trained_anew_in_silence(checkpoints: Path) -> None:
    for name in "ab":
        cut(checkpoints / f"checkpoint_{name}" / "learner.pt")
    with pytest.raises(StorageError, match="all 2 checkpoints"):
        last_whole_checkpoint(checkpoints)
    assert last_whole_checkpoint(checkpoints / "nowhere") is None


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


def test_a_full_disk_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "learner.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_checkpoint(tmp_path, 0, adapter_of(0), {"moments": torch.zeros(100_000)})
    problem = storage_error(caught.value)
    assert "(No space left on device); make room" in str(problem)
    assert "\n" not in str(problem)
    assert not (tmp_path / "manifest.json").exists()
    assert storage_error(OSError(errno.ENOENT, "gone")) is None
