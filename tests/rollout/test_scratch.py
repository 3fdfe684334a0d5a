"""What engines leave behind, which are always killed."""

import os
import signal
from pathlib import Path

import pytest
import ray

from detox_ray.rollout.scratch import scratch_folder


@pytest.mark.e2e
def test_what_a_killed_engine_left_is_removed_by_the_next(local_ray: Path) -> None:
    # As engines, each in a process of its own, which has the folder for as long as it lives.
    start = ray.remote(num_cpus=0)(_Engine).remote
    killed, living = start(), start()
    left, kept = ray.get([killed.folder.remote(), living.folder.remote()])
    assert Path(left).is_relative_to(local_ray.resolve())
    (Path(left) / "v1").mkdir()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(killed.die.remote())
    third = ray.get(start().folder.remote())
    assert not Path(left).exists()
    assert Path(kept).is_dir()
    assert Path(third).is_dir()


class _Engine:
    def __init__(self) -> None:
        self._folder = scratch_folder()

    def folder(self) -> str:
        return str(self._folder)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
