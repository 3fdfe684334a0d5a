"""Rewards for rollouts: the ensemble's scores plus the shaping terms, and what is worth logging of both."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import ShapingConfig
from detox_ray.records import Rollout, Score
from detox_ray.rewards.classifiers import Classifier, load_classifier
from detox_ray.rewards.shaping import shape
from detox_ray.serving.reward_client import RewardClient


class RolloutScorer:
    """The reward app and the shaping terms as a rollout stream wants them. Picklable."""

    def __init__(
        self, client: RewardClient, shaping: ShapingConfig, end_ids: Sequence[int], judge: ClassifierConfig
    ) -> None:
        """`judge` never touches the reward; one that costs next to nothing (linear) is logged with every batch."""
        self._client = client
        self._shaping = shaping
        self._end_ids = tuple(end_ids)
        self._judge_config = judge
        self._judge: Classifier | None = None

    def submit(self, texts: Sequence[str], prompts: Sequence[str]) -> Any:
        """Start scoring; returns a future for `result`."""
        return self._client.submit(texts, prompts)

    def result(self, pending: Any) -> list[Score]:
        """Wait for a future; raises RewardError as `RewardClient.result`."""
        return self._client.result(pending)

    def reward(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> tuple[np.ndarray, dict[str, float]]:
        """[B] float32 rewards, and batch means: `reward`, `reward_raw` (without shaping), `reward/<member>`,
        `disagreement`, `shaping/<term>`, `share_finished`, and `toxicity` by a linear judge."""
        ids = [r.response_ids for r in rollouts]
        kept = np.split(~np.isin(np.concatenate(ids), self._end_ids), np.cumsum([len(row) for row in ids])[:-1])
        responses = [row[row_kept] for row, row_kept in zip(ids, kept, strict=True)]
        raw = np.array([s.reward for s in scores], dtype=np.float32)
        terms = shape(responses, [r.finish_reason for r in rollouts], self._shaping)
        rewards = raw + sum(terms.values())
        metrics = {
            "reward": float(rewards.mean()),
            "reward_raw": float(raw.mean()),
            "reward_std": float(rewards.std()),
            "disagreement": float(np.mean([s.disagreement for s in scores])),
            "share_finished": float(np.mean([r.finish_reason == "stop" for r in rollouts])),
        }
        metrics |= {
            f"reward/{n}": float(np.mean([s.per_classifier[n] for s in scores])) for n in scores[0].per_classifier
        }
        metrics |= {f"shaping/{name}": float(values.mean()) for name, values in terms.items() if values.any()}
        if self._judge_config.kind == "linear":
            self._judge = self._judge or load_classifier(self._judge_config)
            metrics["toxicity"] = float(self._judge.toxicity([r.text for r in rollouts]).mean())
        return rewards, metrics
