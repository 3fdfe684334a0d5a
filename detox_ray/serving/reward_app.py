"""The reward ensemble as a Ray Serve application: one deployment a classifier, and one that composes them.

Calibrations travel with a call, not with a replica: every replica, also one that was just restarted, uses the same
numbers, and fitting them restarts nothing (`serve.run` gives every deployment a new version and so restarts them all).
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from detox_ray.classifier_config import Calibration, ClassifierConfig
from detox_ray.config import RewardConfig
from detox_ray.errors import DetoxError, RewardError
from detox_ray.records import Readings, Score
from detox_ray.rewards.classifiers import check_classifier, load_classifier
from detox_ray.rewards.deadline import DeadlineError, answer_within
from detox_ray.rewards.ensemble import aggregate, calibrate, calibrations
from detox_ray.serving.deploy import (
    QUIET,
    NotStartedError,
    deploy_in_background,
    lifecycle,
    replica_runtime_env,
    wait_until_running,
)
from detox_ray.serving.replica_errors import RESTART_POLL_S, cause_of, described, without_message
from detox_ray.serving.texts import texts_to_read

logger = logging.getLogger(__name__)

T = TypeVar("T")
# (member, its answer, number of texts) -> the answer, or RewardError.
Check = Callable[[str, Any, int], T]

ENSEMBLE = "ensemble"


class ClassifierDeployment:
    """One classifier; one call scores one list, and calls take turns (a fast tokenizer is not thread-safe).

    Serve runs each call in a thread, and the thread of a cancelled call computes on. A call whose turn does not come in
    `left_s`, after which nobody waits for it, or that takes longer, raises DeadlineError.
    """

    def __init__(self, config: ClassifierConfig, release: str = "") -> None:
        """`release` is put on every reading."""
        if config.kind in {"transformers", "evaluate"} and config.num_gpus == 0:
            import torch
            import transformers

            torch.set_num_threads(1)
            transformers.utils.logging.disable_progress_bar()
        # A replica without GPUs of its own may still see the node's.
        self._classifier = load_classifier(config, device="cpu" if config.num_gpus == 0 else None)
        self._busy = threading.Lock()
        self._release = release

    def score(self, texts: list[str], left_s: float | None = None) -> list[float]:
        """Uncalibrated scores, less toxic is higher."""
        with self._turn(left_s):
            return self._classifier.score(texts).tolist()

    def toxicity(self, texts: list[str], left_s: float | None = None) -> list[float]:
        """Probabilities of toxicity."""
        with self._turn(left_s):
            return self._classifier.toxicity(texts).tolist()

    def read(self, texts: list[str], left_s: float | None = None) -> Readings:
        """Score, toxicity and labels of texts of any length."""
        with self._turn(left_s):
            return replace(self._classifier.read(texts), release=self._release)

    @contextmanager
    def _turn(self, left_s: float | None) -> Iterator[None]:
        start = time.monotonic()
        if not self._busy.acquire(timeout=-1 if left_s is None else left_s):
            raise DeadlineError(f"the classifier was busy for {left_s:g} s")
        try:
            with answer_within(None if left_s is None else left_s - (time.monotonic() - start)):
                yield
        except (DetoxError, DeadlineError):
            raise
        except Exception as error:
            # Serve logs it, and its message may quote a text, which may be a user's where the app is part of a service.
            raise RewardError(without_message(error) if self._release else described(error)) from None
        finally:
            self._busy.release()


class EnsembleDeployment:
    """Asks all classifiers at once and makes one Score of their answers; holds no state."""

    def __init__(self, config: RewardConfig, members: dict[str, DeploymentHandle]) -> None:
        self._config = config
        self._members = members

    async def score(
        self,
        texts: list[str],
        prompts: list[str] | None = None,
        member_calibrations: dict[str, Calibration] | None = None,
    ) -> list[Score]:
        """One Score a response in `texts`; `prompts` are needed when the classifiers read prompt and response.

        `member_calibrations` defaults to the numbers in the configuration the app was built with.

        Raises:
            RewardError: a member failed more than `retries` times, did not answer in `timeout_s`, returned something
                that is not a score, or is not calibrated.
        """
        if member_calibrations is None:
            member_calibrations = calibrations(self._config)
        scores = await self.raw_scores(texts, prompts)
        return aggregate({name: calibrate(scores[name], member_calibrations[name]) for name in scores}, self._config)

    async def raw_scores(self, texts: list[str], prompts: list[str] | None = None) -> dict[str, np.ndarray]:
        """The uncalibrated scores of each member, `[N] float32`; raises RewardError as `score`."""
        parts = await self._ask_all("score", texts_to_read(texts, prompts, self._config), _checked)
        return {name: np.concatenate(scores) for name, scores in parts.items()}

    async def toxicity(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Each member's probability of toxicity of the texts alone, `[N] float32`; raises RewardError as `score`."""
        parts = await self._ask_all("toxicity", texts, _checked)
        return {name: np.concatenate(toxicity) for name, toxicity in parts.items()}

    async def read(self, texts: list[str]) -> dict[str, list[Readings]]:
        """Each member's readings of `texts` as they stand, in one or more parts; raises RewardError as `score`."""
        return await self._ask_all("read", texts, _checked_readings)

    async def _ask_all(self, method: str, texts: list[str], check: Check[T]) -> dict[str, list[T]]:
        deadline = time.monotonic() + self._config.timeout_s
        members = self._config.classifiers
        answers = await asyncio.gather(
            *(self._ask_replicas(member, method, texts, check, deadline) for member in members)
        )
        return {member.name: answer for member, answer in zip(members, answers, strict=True)}

    async def _ask_replicas(
        self, member: ClassifierConfig, method: str, texts: list[str], check: Check[T], deadline: float
    ) -> list[T]:
        """One member's answer in parts, from as many of its replicas as there are full batches for."""
        parts = max(1, min(member.replicas, math.ceil(len(texts) / member.batch_size)))
        size = max(1, math.ceil(len(texts) / parts))
        starts = range(0, max(1, len(texts)), size)
        return await asyncio.gather(
            *(self._ask(member.name, method, texts[start : start + size], check, deadline) for start in starts)
        )

    async def _ask(self, name: str, method: str, texts: list[str], check: Check[T], deadline: float) -> T:
        """One replica's answer: errors are retried `retries` times, a lost replica is waited for until `deadline`."""
        failures = 0
        while (left_s := deadline - time.monotonic()) > 0:
            response = getattr(self._members[name], method).remote(texts, left_s)
            try:
                return check(name, await asyncio.wait_for(response, left_s), len(texts))
            except (RayTaskError, RewardError) as error:
                cause = cause_of(error)
                failures += 1
                if failures > self._config.retries:
                    raise RewardError(f"classifier {name!r} failed {failures} times: {described(cause)}") from None
                logger.warning("classifier %r failed, attempt %d: %s", name, failures, type(cause).__name__)
                await asyncio.sleep(0.1 * 2**failures)
            except TimeoutError:
                response.cancel()
                break
            except (RayError, RayServeException) as error:
                if isinstance(error, TaskCancelledError):
                    raise
                logger.warning(
                    "a replica of classifier %r is lost (%s); waiting for another", name, type(error).__name__
                )
                await asyncio.sleep(RESTART_POLL_S)
        raise RewardError(f"classifier {name!r} did not answer within reward.timeout_s={self._config.timeout_s:g} s")


def build_reward_app(
    config: RewardConfig,
    scaling: Mapping[str, Mapping[str, Any]] | None = None,
    drain_s: float = 5.0,
    release: str = "",
) -> serve.Application:
    """The Serve application; its ingress is the ensemble, for handles only.

    `scaling` holds Serve's `autoscaling_config` of the members that have one, whose `replicas` are then the most to
    spread a list over; a replica that is stopped gets `drain_s` to finish what it has begun; `release` is
    put on every reading.

    Raises:
        ConfigError, ModelError: a classifier cannot be loaded, as far as `check_classifier` can tell.
    """
    for classifier in config.classifiers:
        check_classifier(classifier)
    runtime_env = replica_runtime_env()
    scaling = scaling or {}
    members = {
        c.name: serve.deployment(
            name=f"classifier-{c.name}",
            max_ongoing_requests=1,
            **lifecycle(drain_s),
            **({"autoscaling_config": scaling[c.name]} if c.name in scaling else {"num_replicas": c.replicas}),
            max_constructor_retry_count=2,
            ray_actor_options={
                "num_cpus": c.num_cpus,
                "num_gpus": c.num_gpus,
                "resources": c.resources,
                "runtime_env": runtime_env,
            },
        )(ClassifierDeployment).bind(c, release)
        for c in config.classifiers
    }
    return serve.deployment(
        name=ENSEMBLE,
        max_ongoing_requests=100,
        **lifecycle(drain_s),
        ray_actor_options={"num_cpus": 0, "runtime_env": runtime_env},
    )(EnsembleDeployment).bind(config, members)


def deploy_reward_app(config: RewardConfig, app_name: str) -> DeploymentHandle:
    """Runs the reward app, without an HTTP route, and returns its handle when every replica is ready.

    Serve is started without proxies, so that no port opens, unless it already runs on this Ray.

    Raises:
        ConfigError, ModelError: as `build_reward_app`.
        RewardError: a replica does not start, or not within `reward.start_timeout_s`, also when it is started anew
            `reward.retries` times; the app is deleted again.
    """
    app = build_reward_app(config)
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    for retries_left in reversed(range(config.retries + 1)):
        handle = deploy_in_background(app, app_name, route_prefix=None)
        try:
            wait_until_running(app_name, config.start_timeout_s)
            break
        except NotStartedError:
            serve.delete(app_name)
            if not retries_left:
                raise
        except BaseException:
            serve.delete(app_name)
            raise
    return handle


def _checked(name: str, values: Sequence[float] | np.ndarray, expected: int) -> np.ndarray:
    """`values` as `[expected] float32`; raises RewardError unless there are as many and all are finite."""
    scores = np.asarray(values, dtype=np.float32)
    if scores.shape != (expected,):
        raise RewardError(f"classifier {name!r} returned {scores.shape} scores for {expected} texts")
    if not np.isfinite(scores).all():
        raise RewardError(f"classifier {name!r} returned a score that is not finite")
    return scores


def _checked_readings(name: str, readings: Readings, expected: int) -> Readings:
    """`readings`, when every value in them is a finite number for each of `expected` texts, else RewardError."""
    for values in (readings.score, readings.toxicity, *readings.labels.values()):
        _checked(name, values, expected)
    return readings
