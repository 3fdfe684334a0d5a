"""Room on Ray's nodes for all workers of a role at once."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from detox_ray.placement import Placement, waiting_line

SAID_AFTER_S = 15.0
POLL_S = 1.0  # Ray's own waiting does not see Ctrl-C


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
    # A name is for one group of a Ray namespace, which a notebook may have given to several runs.
    group = placement_group([placement.each] * placement.count, name=f"{placement.role} {uuid.uuid4().hex}")
    try:
        due, is_said = time.monotonic() + said_after_s, False
        while not group.wait(POLL_S):
            if not is_said and time.monotonic() > due:
                say(waiting_line(placement))
                is_said = True
        yield group
    finally:
        remove_placement_group(group)


def own_groups() -> list[dict[str, Any]]:
    """Ray's table of the placement groups of this job: of its rollout workers, and Ray Train's of its learners."""
    job = ray.get_runtime_context().get_job_id()
    # The last bytes of a group's id are those of the job that made it.
    groups = ray.util.placement_group_table().values()
    return [g for g in groups if g["state"] != "REMOVED" and g["placement_group_id"].endswith(job)]


def is_of_learners(group: dict[str, Any]) -> bool:
    """Of those in the table: Ray Train's have no name."""
    return not group["name"]
