"""Until when anybody waits for what this thread computes: classifiers look between batches."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


class DeadlineError(TimeoutError):
    """Nobody waits for the answer any more."""


@contextmanager
def answer_within(seconds: float | None) -> Iterator[None]:
    """Set this thread's deadline for the block; None: no deadline."""
    token = _deadline.set(None if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def seconds_left() -> float | None:
    """Until nobody waits any more, at least 0; None: for ever."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def check_deadline(name: str) -> None:
    """Raises DeadlineError in the name of a classifier once nobody waits for it."""
    if seconds_left() == 0:
        raise DeadlineError(f"classifier {name!r} was not done in the time it was given")
