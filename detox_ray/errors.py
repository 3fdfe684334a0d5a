"""The errors a user can cause or must act on; the command line prints each in one line and exits with code 2."""

import errno
import os


class DetoxError(Exception):
    """Base of our own errors: the message names the offending value and the fix."""


class ConfigError(DetoxError):
    """A configuration value is unknown, impossible, or does not fit this machine."""


class DataError(DetoxError):
    """A prompt file is missing, empty, or not in the shape the configuration says."""


class ModelError(DetoxError):
    """A model, tokenizer or adapter cannot be loaded or does not fit the others."""


class RewardError(DetoxError):
    """A classifier failed or returned something that is not a score."""


class DivergenceError(DetoxError):
    """Training left the road: a loss that is no number, a policy far from the reference, responses all alike."""


class SyncError(DetoxError):
    """A rollout worker does not compute what the learner computes."""


class StorageError(DetoxError):
    """A run folder cannot be written any more, or what is in it is damaged."""


def first_line(error: BaseException | str) -> str:
    """The first line of a message, to stand inside one of ours; empty, where there is none."""
    return str(error).strip().partition("\n")[0].rstrip(" \r.;")


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """The first `limit` characters of a message, with its line breaks as spaces, to stand inside one of ours."""
    return " ".join(str(error).split())[:limit]


def last_line(error: BaseException | str) -> str:
    """The last line of a message, where Ray puts the cause, to stand inside one of ours."""
    return str(error).strip().rpartition("\n")[2].strip().rstrip(".;")


def storage_error(error: OSError, folder: str = "") -> StorageError | None:
    """What a user must do about a full or read-only disk; None if the error is of another kind."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    return StorageError(
        f"cannot write to {folder or error.filename or 'disk'} ({os.strerror(error.errno)}); make room, then start the "
        "same command again: a run continues from its last whole checkpoint"
    )
