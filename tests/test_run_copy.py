"""The copy of a run folder: complete, never torn, continued from elsewhere, and never overwritten by who is behind."""

import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from detox_ray import run_copy
from detox_ray.errors import ConfigError, StorageError
from detox_ray.folder_lock import LOCK_FILE
from detox_ray.learner.checkpoint_folder import last_whole_checkpoint, write_checkpoint
from detox_ray.policy.adapter import Adapter, content_digest
from detox_ray.run_copy import LEASE_S, RunCopy, mirrored_to_storage

pytestmark = pytest.mark.unit


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An address that pyarrow opens, and one that only fsspec does."""
    if request.param == "file":
        yield f"file://{tmp_path / 'store'}"
    else:
        yield "memory://bucket/runs"
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def make_run(folder: Path, steps: int) -> Path:
    """A run folder with a checkpoint after so many steps."""
    tensors = {"base_model.model.x.lora_A.weight": np.full((2, 2), steps, dtype=np.float32)}
    adapter = Adapter(0, content_digest({"r": 2}, tensors), {"r": 2}, tensors)
    write_checkpoint(folder / "checkpoints" / f"checkpoint_{steps}", steps - 1, adapter, {"step": steps})
    (folder / "config.yaml").write_text("name: one\n")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(steps)))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def copied(folder: Path, storage: str) -> Iterator[None]:
    """The folder as it is during a run."""
    copy = RunCopy(storage, "one")
    copy.open(folder)
    with mirrored_to_storage(copy, folder):
        yield
    copy.release()


def test_a_run_goes_on_where_its_folder_is_not(storage: str, tmp_path: Path) -> None:
    here, there = make_run(tmp_path / "here", 3), tmp_path / "there"
    for left_out in (".lock", "ray-logs/worker.log", "dequantized_base-1/model.safetensors", "adapter.7.tmp/x"):
        (here / left_out).parent.mkdir(exist_ok=True, parents=True)
        (here / left_out).write_text("not for others")
    with copied(here, storage):
        (here / "report.html").write_text("made while it ran")
    RunCopy(storage, "one").open(there)
    expected = {name: data for name, data in content(here).items() if data != b"not for others"}
    assert content(there) == expected
    found = last_whole_checkpoint(there / "checkpoints")
    assert found is not None
    assert found[0] == 2


def test_a_finished_run_without_checkpoints_is_there_too(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first attempt to fetch it breaks off, after any of its files."""
    here, there = make_run(tmp_path / "here", 3), tmp_path / "there"
    shutil.rmtree(here / "checkpoints")
    (here / "adapter").mkdir()
    (here / "adapter" / "steps.txt").write_text("3")
    (here / "evaluation.json").write_text("{}")
    with copied(here, storage):
        pass
    assert RunCopy(storage, "one").config_tree() == {"name": "one"}
    keep_lease = RunCopy._keep_lease
    for whole in range(len(content(here))):
        left = whole

        def break_off(copy: RunCopy) -> None:
            nonlocal left
            if left == 0:
                raise OSError("the network is gone")
            left -= 1
            keep_lease(copy)

        with monkeypatch.context() as patch:
            patch.setattr(RunCopy, "_keep_lease", break_off)
            with pytest.raises(ConfigError, match="the network is gone"):
                RunCopy(storage, "one").open(there)
    RunCopy(storage, "one").open(there)
    assert content(there) == content(here)


def test_what_a_run_removes_is_removed_and_what_it_changes_is_changed(storage: str, tmp_path: Path) -> None:
    here = make_run(tmp_path / "here", 3)
    with copied(here, storage):
        pass
    (here / "checkpoints" / "checkpoint_3").rename(tmp_path / "gone")
    make_run(here, 6)
    with copied(here, storage):
        pass
    RunCopy(storage, "one").open(tmp_path / "there")
    assert content(tmp_path / "there") == content(here)


def test_a_checkpoint_is_whole_in_the_copy_last(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copying is cut short before each file in turn: there is always a whole checkpoint to go on from."""
    here = make_run(tmp_path / "here", 3)
    with copied(here, storage):
        pass
    (here / "checkpoints" / "checkpoint_3").rename(tmp_path / "gone")
    make_run(here, 6)
    save_file, files = RunCopy._save_file, len(content(here))
    found = []
    for cut in range(files + 1):
        left = cut

        def save_some(copy: RunCopy, folder: Path, name: str, saved: Any) -> Any:
            nonlocal left
            if left == 0:
                raise OSError("the network is gone")
            left -= 1
            return save_file(copy, folder, name, saved)

        monkeypatch.setattr(RunCopy, "_save_file", save_some)
        copy = RunCopy(storage, "one")
        copy.open(here)
        if cut < files:
            with pytest.raises(StorageError, match="the network is gone"):
                copy.save(here)
        else:
            copy.save(here)
        RunCopy(storage, "one").open(tmp_path / f"there-{cut}")
        whole = last_whole_checkpoint(tmp_path / f"there-{cut}" / "checkpoints")
        assert whole is not None
        found.append(whole[0])
    assert found == sorted(found)
    assert (found[0], found[-1]) == (2, 5)


def test_a_file_that_goes_away_while_it_is_copied(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, copy, names = make_run(tmp_path / "here", 3), RunCopy(storage, "one"), run_copy._files_of
    monkeypatch.setattr(run_copy, "_files_of", lambda folder: [*names(folder), "gone.txt"])
    copy.open(here)
    copy.save(here)
    monkeypatch.undo()
    copy.save(here)
    RunCopy(storage, "one").open(tmp_path / "there")
    assert content(tmp_path / "there") == content(here)


def test_a_folder_that_is_behind_its_copy_is_refused(storage: str, tmp_path: Path) -> None:
    with copied(make_run(tmp_path / "ahead", 6), storage):
        pass
    behind = make_run(tmp_path / "behind", 3)
    before = content(behind)
    with pytest.raises(ConfigError, match=r"has come to step 6 and that in .* to step 3; remove"):
        RunCopy(storage, "one").open(behind)
    assert content(behind) == before


def test_a_copy_in_use_on_another_host_is_refused_until_its_user_is_silent(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunCopy(storage, "one").open(make_run(tmp_path / "here", 3))
    RunCopy(storage, "one").open(tmp_path / "here")  # the same host: a command that was killed and started again
    with (tmp_path / "here" / LOCK_FILE).open("w") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use by process"):  # the same host, another folder
            RunCopy(storage, "one").open(tmp_path / "there")
    monkeypatch.setattr(run_copy.socket, "gethostname", lambda: "another")
    with pytest.raises(ConfigError, match=r"is in use by process \d+ on .*; if that was killed, try again in \d+ s"):
        RunCopy(storage, "one").open(tmp_path / "there")
    now = time.time()
    monkeypatch.setattr(run_copy.time, "time", lambda: now + LEASE_S + 1)
    RunCopy(storage, "one").open(tmp_path / "there")


def test_a_release_lets_others_in_at_once(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with copied(make_run(tmp_path / "here", 3), storage):
        pass
    monkeypatch.setattr(run_copy.socket, "gethostname", lambda: "another")
    RunCopy(storage, "one").open(tmp_path / "there")
    assert (tmp_path / "there" / "config.yaml").exists()


def open_elsewhere(storage: str, folder: Path) -> RunCopy:
    """The copy as a process on another host opens it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_copy.socket, "gethostname", lambda: f"host-of-{folder.name}")
        copy = RunCopy(storage, "one")
        copy.open(folder)
    return copy


@pytest.mark.parametrize("ended", [False, True])
def test_who_was_silent_too_long_changes_nothing_any_more(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    here, there = make_run(tmp_path / "here", 3), tmp_path / "there"
    silent = RunCopy(storage, "one")
    silent.open(here)
    silent.save(here)
    now = time.time()
    monkeypatch.setattr(run_copy.time, "time", lambda: now + LEASE_S + 1)
    other = open_elsewhere(storage, there)
    other.save(make_run(there, 6))
    if ended:
        other.release()
    (here / "metrics.jsonl").write_text("what must not be in the copy")
    with pytest.raises(
        StorageError, match=r"was taken over by process \d+ on host-of-there, as may happen after 120 s"
    ):
        silent.save(here)
    silent.release()
    other.save(there)
    other.release()
    open_elsewhere(storage, tmp_path / "third")
    assert content(tmp_path / "third") == content(there)


def test_who_was_silent_in_the_middle_of_a_file_leaves_it_as_the_other_wrote_it(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = make_run(tmp_path / "here", 3), tmp_path / "there"
    silent = RunCopy(storage, "one")
    silent.open(here)
    silent.save(here)
    (here / "metrics.jsonl").write_text("what must not be in the copy")
    keep_lease, now = RunCopy._keep_lease, time.time()
    calls = 0

    def stall(copy: RunCopy) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first bytes of the file are written
            monkeypatch.setattr(RunCopy, "_keep_lease", keep_lease)
            monkeypatch.setattr(run_copy.time, "time", lambda: now + LEASE_S + 1)
            open_elsewhere(storage, there).save(make_run(there, 6))
        keep_lease(copy)

    monkeypatch.setattr(run_copy, "CHUNK_BYTES", 8)
    monkeypatch.setattr(RunCopy, "_keep_lease", stall)
    with pytest.raises(StorageError, match="was taken over"):
        silent.save(here)
    monkeypatch.setattr(run_copy.time, "time", lambda: now + 3 * LEASE_S)
    open_elsewhere(storage, tmp_path / "third")
    assert content(tmp_path / "third") == content(there)


def test_a_finished_run_is_not_overwritten_by_a_copy_that_is_behind(storage: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    with copied(run, storage):
        pass
    make_run(run, 6)  # without `storage`
    shutil.rmtree(run / "checkpoints")
    (run / "adapter").mkdir()
    (run / "adapter" / "steps.txt").write_text("6")
    before = content(run)
    RunCopy(storage, "one").open(run)
    assert content(run) == before


def test_of_two_that_open_a_copy_at_once_one_is_refused(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with copied(make_run(tmp_path / "here", 3), storage):
        pass
    fetch, refused_in_use = RunCopy._fetch, RunCopy._refuse_in_use

    def meanwhile(copy: RunCopy, folder: Path) -> None:
        monkeypatch.setattr(RunCopy, "_refuse_in_use", lambda _: None)  # the other had asked before
        monkeypatch.setattr(RunCopy, "_fetch", fetch)
        open_elsewhere(storage, tmp_path / "there")
        monkeypatch.setattr(RunCopy, "_refuse_in_use", refused_in_use)
        fetch(copy, folder)

    monkeypatch.setattr(RunCopy, "_fetch", meanwhile)
    with pytest.raises(StorageError, match=r"was taken over by process \d+ on host-of-there"):
        RunCopy(storage, "one").open(tmp_path / "again")


def test_a_run_that_was_taken_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, storage = make_run(tmp_path / "here", 3), f"file://{tmp_path / 'store'}"
    monkeypatch.setattr(run_copy, "SAVE_EVERY_S", 0.05)
    monkeypatch.setattr(run_copy, "LEASE_S", -1)
    copy, started = RunCopy(storage, "one"), time.monotonic()
    copy.open(here)
    open_elsewhere(storage, tmp_path / "there")
    with pytest.raises(StorageError, match="was taken over by"), mirrored_to_storage(copy, here):
        time.sleep(60)  # as who waits for Ray
    assert time.monotonic() - started < 30


def test_a_slow_copy_is_in_use_all_the_time(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of a file takes nearly as long as a lease lasts; others ask after each of them."""
    here, now, pieces, keep_lease = make_run(tmp_path / "here", 3), time.time(), 0, RunCopy._keep_lease

    def later(copy: RunCopy) -> None:
        nonlocal now, pieces
        now, pieces = now + LEASE_S * 0.9, pieces + 1
        with pytest.raises(ConfigError, match="is in use by process"):
            open_elsewhere(storage, tmp_path / "other")
        keep_lease(copy)

    copy, files = open_elsewhere(storage, here), len(content(here))
    monkeypatch.setattr(run_copy.time, "time", lambda: now)
    monkeypatch.setattr(RunCopy, "_keep_lease", later)
    copy.save(here)
    assert pieces >= files
    copy.release()
    open_elsewhere(storage, tmp_path / "there")
    assert pieces >= 3 * files
    assert not (tmp_path / "other").exists()


def test_failures_on_the_way_are_logged_and_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, store = make_run(tmp_path / "here", 3), tmp_path / "store"
    monkeypatch.setattr(run_copy, "SAVE_EVERY_S", 0.05)
    monkeypatch.setattr(logging.getLogger("detox_ray"), "propagate", True)
    with copied(here, f"file://{store}"), unreachable(store):
        deadline = time.monotonic() + 20
        while "cannot be written" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert json.loads((store / "one" / "checkpoints" / "checkpoint_3" / "manifest.json").read_text())["step"] == 2


@contextmanager
def unreachable(store: Path) -> Iterator[None]:
    """A file, where a folder is needed."""
    store.rename(store.with_name("aside"))
    store.write_text("")
    yield
    store.unlink()
    store.with_name("aside").rename(store)


def test_what_ends_a_run_is_not_hidden_by_a_copy_that_fails(tmp_path: Path) -> None:
    here, store = make_run(tmp_path / "here", 3), tmp_path / "store"
    copy = RunCopy(f"file://{store}", "one")
    copy.open(here)
    with unreachable(store):
        with pytest.raises(ZeroDivisionError), mirrored_to_storage(copy, here):
            _ = 1 / 0
        with pytest.raises(StorageError, match="cannot be written"), mirrored_to_storage(copy, here):
            pass


def test_what_cannot_be_opened_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage='nowhere://x' is no address .* give one such as s3://"):
        RunCopy("nowhere://x", "one")
    with pytest.raises(ConfigError, match=r"^storage holds a key, .* in the environment") as refused:
        RunCopy("s3://name:secret@bucket/runs", "one")
    assert "secret@" not in str(refused.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        RunCopy(f"file://{tmp_path / 'file'}", "one").open(tmp_path / "here")
