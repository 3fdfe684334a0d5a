"""Ray Train's controller that stops answering is killed, and `run_learners` then starts another."""

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from detox_ray import trainer
from detox_ray.learner_config import LearnerConfig
from detox_ray.run_folder import RunFolder

pytestmark = pytest.mark.unit


@ray.remote(num_cpus=0)
class Controller:
    async def process_id(self) -> int:
        return os.getpid()


def test_only_a_hung_controller_is_killed(
    local_ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "CONTROLLER_POLL_S", 0.1)
    monkeypatch.setattr(trainer, "WORKER_GROUP_START_S", 1.0)
    watching = trainer._trainer(b"", LearnerConfig(timeout_s=2), RunFolder(tmp_path))
    controller = Controller.remote()
    process = psutil.Process(ray.get(controller.process_id.remote()))
    watch = threading.Thread(target=watching._kill_when_hung, args=(controller,))
    watch.start()
    watch.join(timeout=4)
    assert watch.is_alive()
    assert ray.get(controller.process_id.remote()) == process.pid

    process.send_signal(signal.SIGSTOP)
    with pytest.raises(RayActorError):
        ray.get(controller.process_id.remote(), timeout=60)
    watch.join(timeout=10)
    assert not watch.is_alive()
    assert "has not answered for 3 s and is killed" in caplog.text
