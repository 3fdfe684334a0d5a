"""What a failed call to a Serve replica says, and how soon to ask again."""

import traceback

from ray.exceptions import RayTaskError

from detox_ray.errors import DetoxError, first_line

# A restarting replica takes seconds; asking more often only fills logs.
RESTART_POLL_S = 0.5


def cause_of(error: BaseException) -> BaseException:
    """What was raised in the replica, when Ray brought it here."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) else error


def without_message(error: BaseException) -> str:
    """The error's type and the line that raised it."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    code = frame.f_code
    where = f"{code.co_filename}:{line} in {code.co_name}"
    return f"{type(error).__name__} at {where} (its message is left out: it may quote a text)"


def described(error: BaseException) -> str:
    """Our own error's message, or another's type and first line."""
    if isinstance(error, DetoxError):
        return str(error)
    first = first_line(error)
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
