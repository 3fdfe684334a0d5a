"""The judge's view of a run while it trains: a fixed held-out set, answered every few steps, scored on the side."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import SyncError
from detox_ray.evaluation.meter import checked_toxicity
from detox_ray.evaluation.metrics import TOXIC_THRESHOLD
from detox_ray.records import Prompt, Rollout, Sampling
from detox_ray.rewards.classifiers import load_classifier
from detox_ray.rollout.pool import WorkerPool

logger = logging.getLogger(__name__)


@dataclass
class HeldoutEvaluation:
    """Asks the workers for answers to the same prompts, with the same seed, each time. Picklable."""

    judge: ClassifierConfig
    prompts: Sequence[Prompt]
    sampling: Sampling
    timeout_s: float
    _actor: Any = None
    _under_way: list[Any] = field(default_factory=list)

    def start(self, pool: WorkerPool, step: int, reward: float) -> None:
        """Begin with the adapter sent to the workers last; the next batch waits for the answers, nobody for the judge.

        `reward` is the training batch's, kept beside the judge's numbers.
        """
        parts = pool.references(self.prompts, 1, self.sampling)
        if self._actor is None:
            self._actor = ray.remote(num_cpus=0, max_restarts=-1)(Judge).remote(self.judge)
        self._under_way.append(self._actor.judged.remote(step, reward, pool.version, *parts))

    def finished(self, wait: bool = False) -> list[dict[str, float]]:
        """What has been judged since the last call, in the order of the steps; with `wait`, all of it.

        An evaluation whose worker or judge died is left out; so are those left when none ends for `timeout_s`.
        """
        if not self._under_way:
            return []
        ready, self._under_way = ray.wait(self._under_way, num_returns=len(self._under_way), timeout=0.0)
        while wait and self._under_way:
            ended, self._under_way = ray.wait(self._under_way, timeout=self.timeout_s)
            ready += ended
            if not ended:
                logger.warning("%d evaluations during training are lost: none ends", len(self._under_way))
                ray.kill(self._actor)
                self._under_way = []
        lines = []
        for reference in ready:
            try:
                lines.append(ray.get(reference))
            except RayError as error:
                logger.warning("an evaluation during training is lost (%s)", type(error).__name__)
        return sorted(lines, key=lambda line: line["step"])


class Judge:
    """The actor that scores the answers, one evaluation after the other."""

    def __init__(self, judge: ClassifierConfig) -> None:
        self._classifier = load_classifier(judge)

    def judged(self, step: int, reward: float, version: int, *parts: list[Rollout]) -> dict[str, float]:
        """The line of `evaluations.jsonl`, measured as in evaluation.json: the end token is no part of the length.

        Raises:
            RewardError: as `checked_toxicity`.
            SyncError: a worker answered with another adapter than `version`: it had died, or was not reached.
        """
        rollouts = [rollout for part in parts for rollout in part]
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
