"""The judge's view of a run while it trains: a fixed held-out set, answered every few steps, scored on the side."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import SyncError
from detox_ray.evaluation.meter import checked_toxicity
from detox_ray.evaluation.metrics import TOXIC_THRESHOLD
from detox_ray.records import Prompt, Rollout, Sampling
from detox_ray.rewards.classifiers import load_classifier

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # at one evaluation, by a judge that dies or hangs


@dataclass
class HeldoutEvaluation:
    """The judge's scores of responses to the same prompts, sampled with the same seed each time. Picklable.

    Attributes:
        timeout_s: a judge that takes longer over one evaluation is started anew.
    """

    judge_config: ClassifierConfig
    prompts: Sequence[Prompt]
    sampling: Sampling
    timeout_s: float
    _under_way: dict[int, Future[dict[str, float] | None]] = field(default_factory=dict)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "judging")

    @cached_property
    def _judge(self) -> Any:
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=ATTEMPTS - 1)(Judge)
        return actor.remote(self.judge_config)

    def judge(self, rollouts: Future[list[Rollout]], version: int, step: int, reward: float) -> None:
        """Score the rollouts, which `version` of the adapter gives, once they are there; nobody waits for that.

        `reward` is that of the step's batch, kept beside the judge's numbers.
        """
        self._under_way[step] = self._thread.submit(self._judged, rollouts, version, step, reward)

    def finished(self, until: int = 0) -> list[dict[str, float]]:
        """What has been judged since the last call, in the order of the steps; waits for those of steps before `until`.

        An evaluation that the judge fails at is left out, with a warning.

        Raises:
            SyncError, ModelError: the responses could not be sampled.
        """
        steps = [step for step, line in self._under_way.items() if step < until or line.done()]
        lines = [self._under_way.pop(step).result() for step in sorted(steps)]
        return [line for line in lines if line is not None]

    def _judged(
        self, rollouts: Future[list[Rollout]], version: int, step: int, reward: float
    ) -> dict[str, float] | None:
        line = self._judge.judged.remote(rollouts.result(), version, step, reward)
        for _ in range(ATTEMPTS):
            try:
                return dict(ray.get(line, timeout=self.timeout_s))
            except GetTimeoutError:
                ray.kill(self._judge, no_restart=False)  # Ray asks the next one, until it has been killed this often
            except RayError as error:
                logger.warning("the evaluation of step %d is lost (%s)", step, type(error).__name__)
                return None
        logger.warning("the evaluation of step %d is lost: the judge took longer than %g s", step, self.timeout_s)
        return None


class Judge:
    """The actor that scores the responses, one evaluation after the other, on CPU: it has no GPU of its own."""

    def __init__(self, judge: ClassifierConfig) -> None:
        self._classifier = load_classifier(judge, device="cpu")

    def judged(self, rollouts: list[Rollout], version: int, step: int, reward: float) -> dict[str, float]:
        """The line of `evaluations.jsonl`, measured as in evaluation.json: the end token is no part of the length.

        Raises:
            RewardError: as `checked_toxicity`.
            SyncError: a worker answered with another adapter than `version`: it had died meanwhile.
        """
        if {rollout.adapter_version for rollout in rollouts} != {version}:
            raise SyncError(f"responses of a worker without adapter version {version}")
        toxicity = checked_toxicity(self._classifier, [r.text for r in rollouts])
        return {
            "step": step,
            "mean_toxicity": float(toxicity.mean()),
            "share_toxic": float((toxicity >= TOXIC_THRESHOLD).mean()),
            "mean_length": float(np.mean([len(r.response_ids) - (r.finish_reason == "stop") for r in rollouts])),
            "reward": reward,
            "responses": len(rollouts),
        }
