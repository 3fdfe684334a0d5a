"""Room on Ray's nodes for all workers of a run at once."""

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from detox_ray.placement import RoleResources, waiting_line

SAID_AFTER_S = 15.0
POLL_S = 1.0  # Ray's own waiting does not see Ctrl-C
NODE_LOST = (
    "a node with workers of this run is lost, and no other has room for them; add one, or end what holds its room"
)


@dataclass(frozen=True)
class Reservation:
    """A placement group with a bundle for each worker of `roles`, one role after the other.

    Workers that take nothing have no bundle, and there is no group where no worker has one.
    """

    roles: Sequence[RoleResources]
    group: PlacementGroup | None

    def strategies(self, role: RoleResources) -> list[PlacementGroupSchedulingStrategy | str]:
        """Ray's scheduling strategy of each worker of a role."""
        if self.group is None or not role.each:
            return ["DEFAULT"] * role.count
        takers = [placement for placement in self.roles if placement.each]
        first = sum(placement.count for placement in takers[: takers.index(role)])
        return [PlacementGroupSchedulingStrategy(self.group, first + index) for index in range(role.count)]


@contextmanager
def reserve(
    roles: Sequence[RoleResources], say: Callable[[str], None], said_after_s: float = SAID_AFTER_S
) -> Iterator[Reservation]:
    """Room for the workers of all roles, as long as the block runs.

    Ray gives all of them their room or none, so that of two runs neither holds what the other waits for. Waits
    indefinitely for jobs to end or nodes to join, and reports it; likewise after a node is lost.
    """
    bundles = [placement.each for placement in roles if placement.each for _ in range(placement.count)]
    if not bundles:
        yield Reservation(roles, None)
        return
    # A name is for one group of a Ray namespace, which a notebook may have given to several runs.
    group = placement_group(bundles, name=f"detox_ray {uuid.uuid4().hex}")
    ended = threading.Event()
    lines = {"PENDING": waiting_line(roles), "RESCHEDULING": NODE_LOST}
    threading.Thread(target=_say_waiting, args=(group, lines, say, said_after_s / 2, ended), daemon=True).start()
    try:
        while not group.wait(POLL_S):
            pass
        yield Reservation(roles, group)
    finally:
        ended.set()
        remove_placement_group(group)


def has_room(group: PlacementGroup) -> bool:
    """Whether all bundles of a group are on nodes that live."""
    return bool(ray.util.placement_group_table(group)["state"] == "CREATED")


def _say_waiting(
    group: PlacementGroup, lines: dict[str, str], say: Callable[[str], None], poll_s: float, ended: threading.Event
) -> None:
    """Say the line of the group's state when it is seen twice in a row, once until the state is another."""
    seen, polls = "", 0
    while not ended.wait(poll_s):
        try:
            state = ray.util.placement_group_table(group)["state"]
        except Exception:  # Ray is lost, which is for the run's own errors to say
            return
        seen, polls = state, polls + 1 if state == seen else 1
        if polls == 2 and state in lines:
            say(lines[state])
