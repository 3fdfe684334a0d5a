"""The reward app as others see it: scores of texts, and the calibrations fitted on it."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from detox_ray.classifier_config import Calibration
from detox_ray.config import RewardConfig
from detox_ray.errors import RewardError
from detox_ray.records import Score
from detox_ray.rewards.ensemble import UNCALIBRATED, calibrations, fit_calibration, with_calibrations
from detox_ray.serving.replica_errors import RESTART_POLL_S, cause_of, described

logger = logging.getLogger(__name__)

# The client waits this much longer than the ensemble, so that the error that arrives is the one that names a member.
CLIENT_GRACE_S = 10.0


@dataclass(frozen=True)
class PendingScores:
    """A scoring call under way, with what is needed to repeat it; stays in the process that made it."""

    response: DeploymentResponse
    texts: list[str]
    prompts: list[str] | None


class RewardClient:
    """The reward app as the learner sees it: submit, go on with other work, collect. Picklable; synchronous."""

    def __init__(self, app_name: str, config: RewardConfig) -> None:
        """`config` holds numbers for calibrations, such as `fit_calibrations` returned.

        Raises:
            RewardError: a calibration is still `fit`.
        """
        self._app_name = app_name
        self._config = config
        self._calibrations = calibrations(config)
        self._handle: DeploymentHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def submit(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> PendingScores:
        """Starts scoring the responses `texts`; returns at once."""
        prompt_list = None if prompts is None else list(prompts)
        return PendingScores(self._call(list(texts), prompt_list), list(texts), prompt_list)

    def result(self, pending: PendingScores) -> list[Score]:
        """The scores, in the order of the texts; a lost replica costs time, nothing else.

        Raises:
            RewardError: as `EnsembleDeployment.score`, or the ensemble itself did not answer in time.
        """
        response = pending.response
        # From here and not from `submit`: a learner may collect long after.
        deadline = time.monotonic() + self._config.timeout_s + CLIENT_GRACE_S
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                scores = response.result(timeout_s=left_s)
            except RayTaskError as error:
                cause = cause_of(error)
                if isinstance(cause, RewardError):
                    raise RewardError(str(cause)) from None
                raise RewardError(f"the reward app {self._app_name!r} failed: {described(cause)}") from error
            except TimeoutError:
                response.cancel()
                break
            except (RayError, RayServeException) as error:
                logger.warning("the reward app lost a replica (%s); asking again", type(error).__name__)
                time.sleep(RESTART_POLL_S)
                response = self._call(pending.texts, pending.prompts)
                continue
            if len(scores) != len(pending.texts):
                raise RewardError(f"the reward app returned {len(scores)} scores for {len(pending.texts)} texts")
            return scores
        raise RewardError(
            f"the reward app {self._app_name!r} did not answer within reward.timeout_s={self._config.timeout_s:g} s; "
            "is it running, and are its replicas large enough?"
        )

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> list[Score]:
        """`result(submit(texts, prompts))`."""
        return self.result(self.submit(texts, prompts))

    def _call(self, texts: list[str], prompts: list[str] | None) -> DeploymentResponse:
        if self._handle is None:
            try:
                self._handle = serve.get_app_handle(self._app_name)
            except RayServeException as error:
                raise RewardError(f"the reward app {self._app_name!r} is not running: {described(error)}") from error
        return cast(DeploymentResponse, self._handle.score.remote(texts, prompts, self._calibrations))


def fit_calibrations(
    config: RewardConfig, app_name: str, texts: Sequence[str], prompts: Sequence[str] | None = None
) -> dict[str, Calibration]:
    """For every member with `calibration: fit` the mean and spread of its scores of `texts`, by name.

    `texts` are N >= 2 responses of the untrained policy, `prompts` what they answer (for `text: prompt_and_response`).
    Give `with_calibrations` of it to `RewardClient`; the running app is not touched.

    Raises:
        RewardError: as `EnsembleDeployment.score` and `fit_calibration`.
    """
    to_fit = [c.name for c in config.classifiers if c.calibration == "fit"]
    if not to_fit:
        return {}
    unscaled = with_calibrations(config, dict.fromkeys(to_fit, UNCALIBRATED))
    scores = RewardClient(app_name, unscaled).score(texts, prompts)
    fitted = {name: fit_calibration(name, np.array([s.per_classifier[name] for s in scores])) for name in to_fit}
    for name, calibration in fitted.items():
        logger.info(
            "classifier %r: mean %.4f, std %.4f over %d texts", name, calibration.mean, calibration.std, len(texts)
        )
    return fitted
