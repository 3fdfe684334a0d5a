"""What a batch's rewards are made of."""

from typing import cast

import numpy as np
import pytest

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import ShapingConfig
from detox_ray.records import Rollout, Score
from detox_ray.serving.reward_client import RewardClient
from detox_ray.serving.rollout_scorer import RolloutScorer

pytestmark = pytest.mark.unit
END_IDS = (0, 2)


def rollout(*response_ids: int) -> Rollout:
    reason = "stop" if response_ids and response_ids[-1] in END_IDS else "length"
    ids = np.array(response_ids, dtype=np.int64)
    return Rollout("a", "", np.array([1]), ids, np.zeros(len(ids), np.float32), "", reason, 0)


def test_end_tokens_count_for_no_shaping_term() -> None:
    judge = ClassifierConfig(name="judge", kind="transformers", model="none", label="none")
    shaping = ShapingConfig(min_tokens=4, short_penalty=1.0, repetition_penalty=0.0, unfinished_penalty=0.0)
    scorer = RolloutScorer(cast(RewardClient, None), shaping, END_IDS, judge)
    rollouts = [rollout(5, 6, 2), rollout(0), rollout(5, 6, 7, 8), rollout(7, 7, 7, 0), rollout()]
    scores = [Score(1.0, {"one": 1.0}, 0.0)] * len(rollouts)
    rewards, metrics = scorer.reward(rollouts, scores)
    assert rewards.tolist() == [0.5, 0.0, 1.0, 0.75, 0.0]
    assert metrics["share_finished"] == pytest.approx(3 / 5)
    assert metrics["shaping/short"] == pytest.approx(-(0.5 + 1 + 0.25 + 1) / 5)
