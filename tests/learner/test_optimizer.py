"""The learning rate by step, as its settings are described."""

import pytest

from detox_ray.learner.optimizer import schedule_factor
from detox_ray.ppo_config import OptimizerConfig

pytestmark = pytest.mark.unit


def test_rates_rise_over_the_warm_up_and_fall_from_the_first_step_to_the_last() -> None:
    warm, linear = OptimizerConfig(warmup_steps=4), OptimizerConfig(warmup_steps=2, schedule="linear")
    assert [schedule_factor(warm, step, 6) for step in range(6)] == [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
    falling = [1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]
    assert [schedule_factor(linear, step, 5) for step in range(5)] == pytest.approx([falling[0] / 2, *falling[1:]])
