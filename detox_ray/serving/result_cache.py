"""Scores of texts seen before, by a digest of the text; the texts themselves are not kept."""

import hashlib
import os
from collections import OrderedDict
from typing import Generic, TypeVar

R = TypeVar("R")


class ResultCache(Generic[R]):
    """The results of the last `size` texts; 0 keeps none."""

    def __init__(self, size: int) -> None:
        self._size = size
        # With a key of this process nobody can look up in a memory dump whether a text was here.
        self._secret = os.urandom(32)
        self._results: OrderedDict[bytes, R] = OrderedDict()

    def get(self, text: str) -> R | None:
        """The result of a text, or none; the text is then the last that would be dropped."""
        if not self._size:
            return None
        digest = self._digest(text)
        if (result := self._results.get(digest)) is not None:
            self._results.move_to_end(digest)
        return result

    def put(self, text: str, result: R) -> None:
        """Remember a result, and forget the one used longest ago when there are too many."""
        if not self._size:
            return
        self._results[self._digest(text)] = result
        if len(self._results) > self._size:
            self._results.popitem(last=False)

    def _digest(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=16, key=self._secret).digest()
