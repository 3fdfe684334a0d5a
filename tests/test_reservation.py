"""Room for all workers of a run at once, or for none."""

import threading
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from detox_ray.placement import RoleResources
from detox_ray.reservation import reserve

pytestmark = pytest.mark.e2e


def test_who_finds_no_room_for_all_takes_none_says_so_once_and_goes_on_when_there_is(local_ray: Path) -> None:
    holder = placement_group([{"CPU": 1.2}])  # of two
    learner = RoleResources("learner", "train", 1, {"CPU": 0.6})
    worker = RoleResources("rollout worker", "rollout", 1, {"CPU": 0.6})
    lines: list[str] = []
    said, has_room = threading.Event(), threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        said.set()

    def wait_for_room() -> None:
        with reserve([learner, worker], say, said_after_s=0.5):
            has_room.set()

    waiting = threading.Thread(target=wait_for_room)
    try:
        assert holder.wait(60)
        waiting.start()
        assert said.wait(60)
        assert not has_room.wait(2)
        assert ray.available_resources()["CPU"] >= 0.6  # one of the two would fit
    finally:
        remove_placement_group(holder)
    assert has_room.wait(60)
    waiting.join()
    assert lines == [
        "the run waits for room: no nodes have it now for 1 x learner with 0.6 CPUs and 1 x rollout worker with 0.6 "
        "CPUs; end what holds it, add a node, or start again with lower numbers in train and rollout"
    ]


def test_workers_that_take_nothing_need_no_room(local_ray: Path) -> None:
    worker = RoleResources("rollout worker", "rollout", 2, {})
    with reserve([worker], print) as reservation:
        assert reservation.strategies(worker) == ["DEFAULT"] * 2
