"""The errors a user can cause or must act on; the command line prints each in one line and exits with code 2."""


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
