"""A folder is one process's at a time, on the machine that has it, for as long as that process lives."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detox_ray.errors import ConfigError

LOCK_FILE = ".lock"

_held: dict[Path, Any] = {}


def lock(folder: Path) -> None:
    """Hold the folder for the life of this process, or until `release`.

    Raises:
        ConfigError: another process holds it, or this one does for another command.
        OSError: it cannot be written.
    """
    path = folder / LOCK_FILE
    if path in _held:
        raise ConfigError(f"{folder} is in use by another command of this process; wait, or choose another name=...")
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"{folder} is in use by another process; wait, or choose another name=...") from None
    _held[path] = file


def release(folder: Path) -> None:
    """Let other processes have the folder."""
    if (file := _held.pop(folder / LOCK_FILE, None)) is not None:
        file.close()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file for the block, once whoever holds it lets go; it ends with the process, too."""
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def is_in_use(folder: Path) -> bool:
    """Whether another process holds the folder."""
    path = folder / LOCK_FILE
    if path in _held or not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
