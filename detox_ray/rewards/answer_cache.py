"""Answers of a paid API on disk, by the digest of what was asked; threads and processes may share one file."""

import hashlib
import json
import sqlite3
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from detox_ray.folder_lock import locked

# Longest wait for another process that writes to the same file.
BUSY_TIMEOUT_S = 60.0
# Of one process, where there is no file: it may run for months.
ANSWERS_IN_MEMORY = 10_000


class AnswerCache:
    """JSON values by key, each on disk as soon as `put` returns; it holds digests and never what was asked."""

    def __init__(self, path: str | None) -> None:
        """Opens or makes the file; none: the last `ANSWERS_IN_MEMORY`, for the life of this object.

        Raises:
            OSError, sqlite3.Error: it cannot be written, or is another kind of file.
        """
        self._claims = None if path is None else Path(f"{path}.claims")
        if self._claims is not None:
            self._claims.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path or ":memory:", timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        with self._connection:
            self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    @staticmethod
    def key(*asked: Any) -> str:
        """Digest of what is asked, in any form JSON can say."""
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The answer, or None; raises sqlite3.Error."""
        with self._lock:
            row = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer; raises sqlite3.Error."""
        with self._lock, self._connection:
            row = self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
            if self._claims is None:
                oldest = (row.lastrowid or 0) - ANSWERS_IN_MEMORY
                self._connection.execute("DELETE FROM answers WHERE rowid <= ?", (oldest,))

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()

    def claim(self, key: str) -> AbstractContextManager[None]:
        """A context in which no other thread or process asks for the same key; it ends with the process, too."""
        return nullcontext() if self._claims is None else locked(self._claims / key[:2])
