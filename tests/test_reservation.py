"""Room for all workers of a role at once, or for none."""

import threading
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from detox_ray.placement import Placement
from detox_ray.reservation import reserved

pytestmark = pytest.mark.e2e


def test_who_finds_no_room_for_all_takes_none_says_so_once_and_goes_on_when_there_is(local_ray: Path) -> None:
    free = ray.available_resources()["CPU"]
    holder = placement_group([{"CPU": 0.6 * free}])
    needed = Placement("rollout worker", "rollout", 2, {"CPU": 0.3 * free})
    lines: list[str] = []
    said, has_room = threading.Event(), threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        said.set()

    def reserve() -> None:
        with reserved(needed, say, said_after_s=0.5):
            has_room.set()

    waiting = threading.Thread(target=reserve)
    try:
        assert holder.wait(60)
        waiting.start()
        assert said.wait(60)
        assert not has_room.wait(2)
        assert ray.available_resources()["CPU"] == pytest.approx(0.4 * free, abs=0.01)  # one of the two would fit
    finally:
        remove_placement_group(holder)
    assert has_room.wait(60)
    waiting.join()
    assert lines == [
        f"the rollout workers wait for room: no nodes have 2 x {0.3 * free:g} CPUs free now; end what holds them, add "
        "a node, or start again with lower numbers in rollout"
    ]


def test_workers_that_take_nothing_need_no_room(local_ray: Path) -> None:
    with reserved(Placement("rollout worker", "rollout", 2, {}), print) as room:
        assert room is None
