"""Where Ray Train's learners are placed."""

import threading
import time
from pathlib import Path

import pytest
from learner_in_room import PlacesTask, note_place
from ray.util.placement_group import placement_group, remove_placement_group

from detox_ray.learner_config import LearnerConfig
from detox_ray.placement import RoleResources, learner_placement
from detox_ray.reservation import reserve
from detox_ray.run_folder import RunFolder
from detox_ray.trainer import run_learners

pytestmark = pytest.mark.e2e


def test_learners_stay_in_their_runs_room_also_when_another_run_waits_for_it(tmp_path: Path, local_ray: Path) -> None:
    config = LearnerConfig.model_validate({"workers": 2, "num_cpus": 0.5, "max_failures": 1})
    engines = RoleResources("rollout worker", "rollout", 1, {"CPU": 0.25})
    task = PlacesTask(tmp_path)
    waiting = None
    with reserve([learner_placement(config), engines], print) as reservation:
        work = (note_place, task, config, RunFolder(tmp_path / "run"), reservation)
        learning = threading.Thread(target=run_learners, args=work)
        learning.start()
        try:
            wait_for(tmp_path / "place-1-0")
            waiting = placement_group([{"CPU": 1}] * 2)  # has room only where the learners are
            assert not waiting.wait(1)
            task.die.touch()
            learning.join(120)
            assert not learning.is_alive()
            assert not waiting.wait(0.1)
        finally:
            if waiting is not None:
                remove_placement_group(waiting)
        places = [file.read_text() for file in sorted(tmp_path.glob("place-*"))]
    assert reservation.group is not None
    assert places == [reservation.group.id.hex()] * 4  # two learners, two attempts
    strategies = [*reservation.strategies(learner_placement(config)), *reservation.strategies(engines)]
    assert [strategy.placement_group_bundle_index for strategy in strategies] == [0, 1, 2]  # type: ignore[union-attr]


def wait_for(file: Path) -> None:
    """At most two minutes."""
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} does not come"
        time.sleep(0.1)
