"""Room on Ray's nodes for all workers of a role at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from detox_ray.placement import Placement, waiting_line

SAID_AFTER_S = 15.0


@contextmanager
def reserved(
    placement: Placement, say: Callable[[str], None], said_after_s: float = SAID_AFTER_S
) -> Iterator[PlacementGroup | None]:
    """A placement group with a bundle for each worker, or none where workers take nothing.

    Ray gives all of them their room or none, so that two runs that start together do not each hold half of their
    workers. Waits without end, as others end and nodes are added, and has it said.
    """
    if not placement.each:
        yield None
        return
    group = placement_group([placement.each] * placement.count, name=placement.role)
    try:
        if not group.wait(said_after_s):
            say(waiting_line(placement))
            while not group.wait(said_after_s):
                pass
        yield group
    finally:
        remove_placement_group(group)
