"""What is said while Ray has no room for the learners."""

import time
from pathlib import Path

import pytest
from ray.util.placement_group import placement_group, remove_placement_group

from detox_ray.learner_config import LearnerConfig
from detox_ray.trainer import waiting_in_words

pytestmark = pytest.mark.e2e


def test_learners_that_wait_for_room_are_said_to(local_ray: Path) -> None:
    config = LearnerConfig.model_validate({"workers": 2, "num_cpus": 64, "resources": {"learner_node": 1}})
    lines: list[str] = []
    group = placement_group([{"CPU": 64}] * 2)
    try:
        with waiting_in_words(config, lines.append, poll_s=0.1):
            deadline = time.monotonic() + 60
            while not lines:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            time.sleep(1)
    finally:
        remove_placement_group(group)
    assert len(lines) == 1
    assert "2 x 64 CPUs, 1 of 'learner_node' free now" in lines[0]


def test_learners_that_have_room_are_not_spoken_of(local_ray: Path) -> None:
    lines: list[str] = []
    group = placement_group([{"CPU": 1}])
    try:
        assert group.wait(60)
        with waiting_in_words(LearnerConfig.model_validate({}), lines.append, poll_s=0.1):
            time.sleep(1)
    finally:
        remove_placement_group(group)
    assert lines == []
