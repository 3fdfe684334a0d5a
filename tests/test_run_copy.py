"""The copy of a run folder: complete, never torn, continued from elsewhere, and never overwritten by who is behind."""

import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pytest
from watched_store import WatchedFiles, cut_off

from detox_ray import run_copy
from detox_ray.errors import ConfigError, StorageError
from detox_ray.folder_lock import LOCK_FILE
from detox_ray.learner.checkpoint_folder import last_whole_checkpoint, write_checkpoint
from detox_ray.policy.adapter import Adapter, content_digest
from detox_ray.run_copy import LEASE_FILE, LEASE_S, RunCopy, mirrored_to_storage

pytestmark = pytest.mark.unit


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An address that pyarrow opens, and one that only fsspec does."""
    if request.param == "file":
        yield f"file://{tmp_path / 'store'}"
    else:
        yield "memory://bucket/runs"
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[str]:
    """The address of such a store."""
    yield f"watched://{tmp_path / 'store'}"
    WatchedFiles.before = lambda operation, path: None


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


def test_a_finished_run_without_checkpoints_is_there_too(watched: str, tmp_path: Path) -> None:
    """Also where attempts to fetch it break off, each at a later operation."""
    here, there = make_run(tmp_path / "here", 3), tmp_path / "there"
    shutil.rmtree(here / "checkpoints")
    (here / "adapter").mkdir()
    (here / "adapter" / "steps.txt").write_text("3")
    (here / "evaluation.json").write_text("{}")
    with copied(here, watched):
        pass
    assert RunCopy(watched, "one").config_tree() == {"name": "one"}
    for cut in range(len(content(here))):
        with cut_off(cut), pytest.raises(ConfigError, match="the network is gone"):
            RunCopy(watched, "one").open(there)
    RunCopy(watched, "one").open(there)
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


def test_a_checkpoint_is_whole_in_the_copy_last(watched: str, tmp_path: Path) -> None:
    """The copying is cut short before each operation in turn: there is always a whole checkpoint to go on from."""
    here = make_run(tmp_path / "here", 3)
    with copied(here, watched):
        pass
    (here / "checkpoints" / "checkpoint_3").rename(tmp_path / "gone")
    make_run(here, 6)
    found: list[int] = []
    while not found or found[-1] != 5:
        copy = RunCopy(watched, "one")
        copy.open(here)
        with cut_off(len(found)), pytest.raises(StorageError, match="the network is gone"):
            copy.save(here)
        there = tmp_path / f"there-{len(found)}"
        RunCopy(watched, "one").open(there)
        whole = last_whole_checkpoint(there / "checkpoints")
        assert whole is not None
        found.append(whole[0])
    assert found == sorted(found)
    assert found[0] == 2


def test_a_file_that_goes_away_while_it_is_copied(watched: str, tmp_path: Path) -> None:
    here, copy = make_run(tmp_path / "here", 3), RunCopy(watched, "one")
    copy.open(here)
    WatchedFiles.before = lambda operation, path: (here / "metrics.jsonl").unlink(missing_ok=True)
    copy.save(here)
    copy.save(here)
    RunCopy(watched, "one").open(tmp_path / "there")
    assert content(tmp_path / "there") == content(here)


def test_a_file_that_is_no_longer_in_the_copy_need_not_be_removed(storage: str, tmp_path: Path) -> None:
    here, copy = make_run(tmp_path / "here", 3), RunCopy(storage, "one")
    copy.open(here)
    copy.save(here)
    (here / "metrics.jsonl").unlink()
    fsspec.filesystem(storage.partition(":")[0]).rm(f"{storage.partition('://')[2]}/one/metrics.jsonl")
    copy.save(here)
    RunCopy(storage, "one").open(tmp_path / "there")
    assert content(tmp_path / "there") == content(here)


def test_what_a_killed_process_was_copying_is_removed(storage: str, tmp_path: Path) -> None:
    files, folder = fsspec.filesystem(storage.partition(":")[0]), f"{storage.partition('://')[2]}/one"
    with copied(make_run(tmp_path / "here", 3), storage):
        pass
    files.pipe_file(f"{folder}/part.7.tmp", b"half a file")
    RunCopy(storage, "one").open(tmp_path / "there")
    assert not files.exists(f"{folder}/part.7.tmp")


def test_a_folder_that_is_behind_its_copy_is_refused(storage: str, tmp_path: Path) -> None:
    with copied(make_run(tmp_path / "ahead", 6), storage):
        pass
    behind = make_run(tmp_path / "behind", 3)
    before = content(behind)
    with pytest.raises(ConfigError, match=r"has come to step 6 and that in .* to step 3; remove"):
        RunCopy(storage, "one").open(behind)
    assert content(behind) == before


def elsewhere(storage: str, folder: Path, after_s: float = 0.0) -> RunCopy:
    """The copy as a process on another host opens it, so much later."""
    copy = RunCopy(storage, "one", f"host-of-{folder.name}", lambda: time.time() + after_s)
    copy.open(folder)
    return copy


def test_a_copy_in_use_on_another_host_is_refused_until_its_user_is_silent(storage: str, tmp_path: Path) -> None:
    RunCopy(storage, "one").open(make_run(tmp_path / "here", 3))
    RunCopy(storage, "one").open(tmp_path / "here")  # the same host: a command that was killed and started again
    with (tmp_path / "here" / LOCK_FILE).open("w") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use by process"):  # the same host, another folder
            RunCopy(storage, "one").open(tmp_path / "there")
    with pytest.raises(ConfigError, match=r"is in use by process \d+ on .*; if that was killed, try again in \d+ s"):
        elsewhere(storage, tmp_path / "there")
    elsewhere(storage, tmp_path / "there", LEASE_S + 1)


def test_a_release_lets_others_in_at_once(storage: str, tmp_path: Path) -> None:
    with copied(make_run(tmp_path / "here", 3), storage):
        pass
    elsewhere(storage, tmp_path / "there")
    assert (tmp_path / "there" / "config.yaml").exists()


@pytest.mark.parametrize("ended", [False, True])
def test_who_was_silent_too_long_changes_nothing_any_more(storage: str, tmp_path: Path, ended: bool) -> None:
    here, there = make_run(tmp_path / "here", 3), tmp_path / "there"
    silent = RunCopy(storage, "one")
    silent.open(here)
    silent.save(here)
    other = elsewhere(storage, there, LEASE_S + 1)
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
    elsewhere(storage, tmp_path / "third")
    assert content(tmp_path / "third") == content(there)


@pytest.mark.parametrize("operation", ["open", "write", "move"])
def test_who_was_silent_in_the_middle_of_a_file_leaves_it_as_the_other_wrote_it(
    watched: str, tmp_path: Path, operation: str
) -> None:
    """Also where both processes have the same id, as the first ones of two containers have."""
    here, there, now = make_run(tmp_path / "here", 3), tmp_path / "there", time.time()
    silent = RunCopy(watched, "one", clock=lambda: now)
    silent.open(here)
    silent.save(here)
    (here / "metrics.jsonl").write_text("what must not be in the copy")

    def stall(before: str, path: str) -> None:
        nonlocal now
        if before == operation and not path.endswith(LEASE_FILE):
            WatchedFiles.before = lambda operation, path: None
            elsewhere(watched, there, LEASE_S + 1).save(make_run(there, 6))
            now += LEASE_S + 2

    WatchedFiles.before = stall
    if operation == "move":
        silent.save(here)  # what it was moving is not there any more
    with pytest.raises(StorageError, match="was taken over"):
        silent.save(here)
    elsewhere(watched, tmp_path / "third", 3 * LEASE_S)
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


@pytest.mark.parametrize("moment", [("open", LEASE_FILE), ("read", "config.yaml")])
def test_of_two_that_open_a_copy_at_once_one_is_refused(watched: str, tmp_path: Path, moment: tuple[str, str]) -> None:
    """The other comes before the first one's lease is there, or takes over from one that is slow at fetching."""
    with copied(make_run(tmp_path / "here", 3), watched):
        pass
    other: list[RunCopy] = []

    def meanwhile(before: str, path: str) -> None:
        if (before, Path(path).name) == moment:
            WatchedFiles.before = lambda operation, path: None
            other.append(elsewhere(watched, tmp_path / "there", LEASE_S + 1))

    WatchedFiles.before = meanwhile
    with pytest.raises(StorageError, match=r"was taken over by process \d+ on "):  # noqa: PT012  # either of the two
        RunCopy(watched, "one").open(tmp_path / "again")
        other[0].save(tmp_path / "there")


def test_a_run_that_was_taken_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, storage = make_run(tmp_path / "here", 3), f"file://{tmp_path / 'store'}"
    monkeypatch.setattr(run_copy, "SAVE_EVERY_S", 0.05)
    monkeypatch.setattr(run_copy, "LEASE_S", -1)
    copy, started = RunCopy(storage, "one"), time.monotonic()
    copy.open(here)
    elsewhere(storage, tmp_path / "there")
    with pytest.raises(StorageError, match="was taken over by"), mirrored_to_storage(copy, here):
        time.sleep(60)  # as who waits for Ray
    assert time.monotonic() - started < 30


def test_a_slow_copy_is_in_use_all_the_time(watched: str, tmp_path: Path) -> None:
    """Every file takes nearly as long as a lease lasts; others ask after each of them."""
    here, late, files, slow = make_run(tmp_path / "here", 3), 0.0, 0, "write"

    def later(operation: str, path: str) -> None:
        nonlocal late, files
        if operation == slow and not path.endswith((LEASE_FILE, "manifest.json")):
            late, files = late + LEASE_S * 0.9, files + 1
            WatchedFiles.before = lambda operation, path: None
            with pytest.raises(ConfigError, match="is in use by process"):
                elsewhere(watched, tmp_path / "other", late)
            WatchedFiles.before = later

    for folder in (here, tmp_path / "there"):
        WatchedFiles.before = later
        copy = RunCopy(watched, "one", f"host-of-{folder.name}", lambda: time.time() + late)
        copy.open(folder)
        copy.save(folder)
        copy.release()
        assert files >= len(content(here)) - 1
        files, slow = 0, "read"
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
