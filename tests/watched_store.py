"""A store of files, in fsspec's way, that tells a test of each operation before it is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem


class WatchedFiles(LocalFileSystem):
    """Files of this machine, as `watched://PATH`."""

    protocol = "watched"
    before: ClassVar[Callable[[str, str], None]] = lambda operation, path: None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("watched://"))

    def _open(self, path: str, mode: str = "rb", **_: Any) -> LocalFileOpener:
        WatchedFiles.before("read" if mode == "rb" else "open", path)
        return WatchedFile(path, mode, fs=self)

    def mv(self, path1: str, path2: str, **settings: Any) -> None:
        WatchedFiles.before("move", path2)
        super().mv(path1, path2, **settings)

    def rm(self, path: str, **settings: Any) -> None:
        WatchedFiles.before("remove", path)
        super().rm(path, **settings)


class WatchedFile(LocalFileOpener):
    """One that is written."""

    def write(self, *data: Any) -> Any:
        WatchedFiles.before("write", self.path)
        return super().write(*data)


fsspec.register_implementation("watched", WatchedFiles, clobber=True)


@contextmanager
def cut_off(after: int) -> Iterator[None]:
    """The store fails from one operation on."""
    left = after

    def count(*_: str) -> None:
        nonlocal left
        if left == 0:
            raise OSError("the network is gone")
        left -= 1

    WatchedFiles.before = count
    yield
    WatchedFiles.before = lambda operation, path: None
