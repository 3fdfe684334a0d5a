"""The copy of a run folder in an object store (`storage`), from which the run goes on where its folder is not."""

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pyarrow
import yaml
from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, LocalFileSystem, PyFileSystem

from detox_ray.errors import ConfigError, StorageError, first_line
from detox_ray.folder_lock import is_in_use
from detox_ray.metrics_file import ADAPTER_FOLDER, CHECKPOINT_FOLDER, CONFIG_FILE, MANIFEST_FILE, STEPS_FILE

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 30
LEASE_S = 120  # a copy that nobody has written to for so long is in nobody's use
RENEW_EVERY_S = 10
CHUNK_BYTES = 16 * 2**20
LEASE_FILE = "in_use.json"
FETCHING_FILE = ".fetching"  # in a run folder into which a copy is being fetched
# Ray's logs, what can be made again, and what is being written or replaced.
LEFT_OUT = re.compile(
    r"(^|/)(\.lock|ray-logs|dequantized_base-[^/]*|[^/]+\.\d+\.(tmp|old)|in_use\.json|\.fetching)(/|$)"
)
PART = re.compile(r"part\.\d+\.tmp")  # what a process is copying a file to
INTERRUPT = signal.SIGUSR1  # not SIGINT, which a command in the background of a script ignores


class TakenOverError(StorageError):
    """Another process went on with the run in the copy, and what is in it must not be overwritten."""


class RunCopy:
    """The copy of one run folder at `storage/name`."""

    def __init__(
        self, storage: str, name: str, host: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """For a process on `host`, which is this one unless it is given.

        Raises:
            ConfigError: `storage` is no address of a file system that can be opened here, or holds a key.
        """
        if re.match(r"[^/]+://[^/@]*:[^/@]*@", storage):
            raise ConfigError(
                "storage holds a key, which would stand in config.yaml; give it in the environment instead, such as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        self.address = f"{storage.rstrip('/')}/{name}"
        self._files, root = _file_system(storage)
        self._root = f"{root.rstrip('/')}/{name}"
        self._clock = clock
        owner = str(uuid4().int)  # in digits, as `LEFT_OUT` has them in the name of `_part`
        self._lease = {"owner": owner, "host": host or socket.gethostname(), "pid": os.getpid()}
        self._part = f"part.{owner}.tmp"
        self._renewed_at = 0.0
        self._saved: dict[str, tuple[int, int] | None] | None = None
        self._folders: set[str] = set()

    def open(self, folder: Path) -> None:
        """Fill the folder with the run, if the copy has one and the folder has none, and let nobody else do so.

        Raises:
            ConfigError: the copy is in use elsewhere, is ahead of a run in the folder, or cannot be read or written.
            TakenOverError: another process has begun to use it at the same time.
        """
        try:
            self._refuse_in_use()
            there, here = _steps(self._files, self._root), _steps(LocalFileSystem(), str(folder))
            if (folder / FETCHING_FILE).exists():
                here = 0
            if there > here > 0:
                raise ConfigError(
                    f"storage: the run in {self.address} has come to step {there} and that in {folder} to step "
                    f"{here}; remove {folder} to go on from the copy, or choose another name=..."
                )
            self._lease["folder"] = str(folder)
            self._write_lease(self._clock())
            if there > here:
                self._fetch(folder)
            self._refuse_taken_over()
            for name in self._found():
                if PART.fullmatch(name):
                    self._delete(name)  # left by who was killed, or is too late to move it into place
        except (ConfigError, TakenOverError):
            raise
        except Exception as error:  # fsspec's file systems raise errors of their own
            raise ConfigError(f"storage: {self.address} cannot be used ({_reason(error)})") from None

    def config_tree(self) -> dict[str, Any] | None:
        """The configuration of the run in the copy; None: it has none that came as far as an adapter.

        Raises:
            ConfigError: the copy cannot be read.
        """
        try:
            if _steps(self._files, self._root) == 0:
                return None
            with self._files.open_input_stream(f"{self._root}/{CONFIG_FILE}") as file:
                found = yaml.safe_load(file.read())
        except FileNotFoundError:
            return None
        except Exception as error:
            raise ConfigError(f"storage: {self.address} cannot be used ({_reason(error)})") from None
        return found if isinstance(found, dict) else None

    def save(self, folder: Path) -> None:
        """Make the copy like the folder; a checkpoint becomes whole there last, and is removed after a newer one came.

        Raises:
            TakenOverError: another process has gone on with the run; the copy is left as it is.
            StorageError: it cannot be written.
        """
        try:
            self._refuse_taken_over()
            self._write_lease(self._clock())
            if self._saved is None:
                self._saved = dict.fromkeys(self._listed(), None)
            present = _files_of(folder)
            for name in present:
                if (saved := self._save_file(folder, name, self._saved.get(name))) is not None:
                    self._saved[name] = saved
            for name in self._saved.keys() - set(present):
                self._keep_lease()
                self._delete(name)
                del self._saved[name]
        except TakenOverError:
            raise
        except Exception as error:
            raise StorageError(
                f"storage: {self.address} cannot be written ({_reason(error)}); the run is whole in {folder}: "
                "start the same command again once the cause is mended"
            ) from None

    def release(self) -> None:
        """Let others use the copy at once, unless they do already."""
        if self._renewed_at > 0:
            with suppress(Exception):
                self._refuse_taken_over()
                self._write_lease(0.0)  # not removed: whoever it was taken from must hear of it

    def _save_file(self, folder: Path, name: str, saved: tuple[int, int] | None) -> tuple[int, int] | None:
        """Save it if it is not as it was; size and time of what is saved now."""
        try:
            found = (folder / name).stat()
            now = (found.st_size, found.st_mtime_ns)
            if now != saved:
                self._keep_lease()
                with (folder / name).open("rb") as source, self._output(self._part) as target:
                    while chunk := source.read(CHUNK_BYTES):
                        target.write(chunk)
                        self._keep_lease()
                # Not before: who noticed in the middle that the copy was taken over must leave the file as it is.
                self._make_parent(name)
                self._files.move(f"{self._root}/{self._part}", f"{self._root}/{name}")
        except FileNotFoundError:
            return saved  # replaced or removed meanwhile: the next time tells
        return now

    def _fetch(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FETCHING_FILE).touch()
        for name in self._listed():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with self._files.open_input_stream(f"{self._root}/{name}") as source, (folder / name).open("wb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
                    self._keep_lease()
        (folder / FETCHING_FILE).unlink()

    def _output(self, name: str) -> Any:
        self._make_parent(name)
        return self._files.open_output_stream(f"{self._root}/{name}")

    def _make_parent(self, name: str) -> None:
        if (parent := f"{self._root}/{name}".rpartition("/")[0]) not in self._folders:
            self._files.create_dir(parent, recursive=True)
            self._folders.add(parent)

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):  # deleted before: the answer was lost, or the store has rules of its own
            self._files.delete_file(f"{self._root}/{name}")

    def _listed(self) -> list[str]:
        return [name for name in self._found() if not LEFT_OUT.search(name)]

    def _found(self) -> list[str]:
        found = self._files.get_file_info(FileSelector(self._root, recursive=True, allow_not_found=True))
        return [info.path.removeprefix(f"{self._root}/") for info in found if info.type == FileType.File]

    def _write_lease(self, now: float) -> None:
        with self._output(LEASE_FILE) as file:
            file.write(json.dumps({**self._lease, "time": now}).encode())
        self._renewed_at = now

    def _keep_lease(self) -> None:
        """Renew it where that is due; errors as `_refuse_taken_over`."""
        if self._clock() - self._renewed_at > RENEW_EVERY_S:
            self._refuse_taken_over()
            self._write_lease(self._clock())

    def _refuse_taken_over(self) -> None:
        """Raises:
        TakenOverError: the lease is another's by now.
        """
        lease = self._read_lease()
        if lease is not None and lease.get("owner") != self._lease["owner"]:
            raise TakenOverError(
                f"storage: {self.address} was taken over by process {lease['pid']} on {lease['host']}, as may happen "
                f"after {LEASE_S} s of silence; this process ends here and leaves it as it is"
            )

    def _read_lease(self) -> dict[str, Any] | None:
        return _read_json(self._files, f"{self._root}/{LEASE_FILE}")

    def _refuse_in_use(self) -> None:
        lease = self._read_lease()
        if lease is None:
            return
        # A lease of this host counts only while a process holds the lock of the run folder that it names.
        folder = lease.get("folder")  # a lease of an earlier version has none
        if lease["host"] == self._lease["host"] and (folder is None or not is_in_use(Path(folder))):
            return
        silent_s = self._clock() - lease["time"]
        if silent_s < LEASE_S:
            raise ConfigError(
                f"storage: {self.address} is in use by process {lease['pid']} on {lease['host']}; if that was killed, "
                f"try again in {LEASE_S - silent_s:.0f} s, or choose another name=..."
            )


@contextmanager
def mirrored_to_storage(copy: RunCopy | None, folder: Path) -> Iterator[None]:
    """While the block runs, and once more behind it, save the folder to its copy; None: do nothing.

    Raises:
        TakenOverError: another process has gone on with the run, which ends the block at once.
        StorageError: it could not be saved at the end; failures on the way are logged and made up for.
    """
    if copy is None:
        yield
        return
    ended = threading.Event()
    lost: list[TakenOverError] = []

    def save_or_log() -> None:
        try:
            copy.save(folder)
        except StorageError as error:
            logger.warning("%s", error)
            if isinstance(error, TakenOverError):
                lost.append(error)

    def follow() -> None:
        while not lost and not ended.wait(SAVE_EVERY_S):
            save_or_log()
        if lost:
            interrupt()

    thread = threading.Thread(target=follow, daemon=True)
    with _interruptible() as interrupt:
        thread.start()
        try:
            try:
                yield
            finally:
                ended.set()
                thread.join()
        except BaseException:
            if lost:
                raise lost[0] from None
            save_or_log()  # what ended the block is what its user must hear of
            raise
    copy.save(folder)


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """What another thread calls to end the block by KeyboardInterrupt, which alone gets out of Ray's waiting.

    It does nothing where the block is not in the main thread, which alone can be interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    main, before = threading.get_ident(), signal.signal(INTERRUPT, signal.default_int_handler)
    try:
        yield lambda: signal.pthread_kill(main, INTERRUPT)
    finally:
        signal.signal(INTERRUPT, before or signal.SIG_DFL)


def _file_system(storage: str) -> tuple[FileSystem, str]:
    """The file system and the path in it: one of pyarrow's or, where it knows none of that kind, of fsspec's."""
    try:
        return FileSystem.from_uri(storage)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        return _fsspec_file_system(storage)
    except OSError as error:
        raise ConfigError(f"storage={storage!r} cannot be reached ({_reason(error)})") from None


def _fsspec_file_system(storage: str) -> tuple[FileSystem, str]:
    try:
        found, path = fsspec.core.url_to_fs(storage)
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(
            f"storage={storage!r} is no address that pyarrow or fsspec can open ({_reason(error)}); "
            "give one such as s3://bucket/runs"
        ) from None
    return PyFileSystem(FSSpecHandler(found)), path


def _steps(files: FileSystem, root: str) -> int:
    """How many steps the run in a folder has come, by its whole checkpoints and its adapter."""
    selector = FileSelector(f"{root}/{CHECKPOINT_FOLDER}", recursive=True, allow_not_found=True)
    manifests = [info.path for info in files.get_file_info(selector) if info.base_name == MANIFEST_FILE]
    found = [_read_json(files, path) for path in manifests]
    adapter = _read_json(files, f"{root}/{ADAPTER_FOLDER}/{STEPS_FILE}") or 0
    return max([adapter, *(manifest["step"] + 1 for manifest in found if manifest)])


def _read_json(files: FileSystem, path: str) -> Any:
    """The file's content; None: there is none, or it is torn."""
    try:
        with files.open_input_stream(path) as file:
            return json.loads(file.read())
    except (FileNotFoundError, ValueError):
        return None


def _files_of(folder: Path) -> list[str]:
    """What of a run folder is copied, in the order in which it is."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted((name for name in names if not LEFT_OUT.search(name)), key=_notes_last)


def _notes_last(name: str) -> tuple[bool, str]:
    """What says that a checkpoint or an adapter is there comes after all the rest."""
    return name.endswith((MANIFEST_FILE, STEPS_FILE)), name


def _reason(error: Exception) -> str:
    """In a few words; some errors of fsspec have no message."""
    return first_line(error) or type(error).__name__
