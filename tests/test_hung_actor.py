"""An actor that stops answering is killed, and where it restarts it is watched on."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from detox_ray import hung_actor
from detox_ray.hung_actor import kill_when_hung

pytestmark = pytest.mark.e2e
TIMEOUT_S = 3


@ray.remote(num_cpus=0)
class Controller:
    def __init__(self, hang_once: Path | None = None) -> None:
        """With a file that does not exist the process stops right here, but not when it is started again."""
        if hang_once is not None and not hang_once.exists():
            hang_once.touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    async def process_id(self) -> int:
        return os.getpid()


Watch = Callable[..., threading.Thread]


@pytest.fixture
def watch(local_ray: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts to watch an actor; ends it after the test."""
    monkeypatch.setattr(hung_actor, "POLL_S", 0.1)
    ended, threads = threading.Event(), []

    def watch(actor: Any, restart_s: float | None, **options: Any) -> threading.Thread:
        watched = (actor, "the controller", TIMEOUT_S, ended, restart_s)
        threads.append(threading.Thread(target=kill_when_hung, args=watched, kwargs=options))
        threads[-1].start()
        return threads[-1]

    yield watch
    ended.set()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_only_a_hung_actor_is_killed(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    controller = Controller.remote()
    process = psutil.Process(ray.get(controller.process_id.remote()))
    thread = watch(controller, None)
    thread.join(timeout=TIMEOUT_S + 1)
    assert thread.is_alive()
    assert ray.get(controller.process_id.remote()) == process.pid

    process.send_signal(signal.SIGSTOP)
    with pytest.raises(RayActorError):
        ray.get(controller.process_id.remote(), timeout=60)
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert "the controller has not answered for 3 s and is killed" in caplog.text


def test_one_that_waits_for_what_may_take_long_is_not_killed_over_it(watch: Watch) -> None:
    controller, waits = Controller.remote(), threading.Event()
    os.kill(ray.get(controller.process_id.remote()), signal.SIGSTOP)
    waits.set()
    thread = watch(controller, None, may_wait=waits.is_set)
    thread.join(timeout=2 * TIMEOUT_S)
    assert thread.is_alive()
    waits.clear()
    with pytest.raises(RayActorError):
        ray.get(controller.process_id.remote(), timeout=60)


def test_an_actor_that_restarts_is_watched_on(watch: Watch) -> None:
    controller = Controller.options(max_restarts=-1, max_task_retries=-1).remote()
    hung = ray.get(controller.process_id.remote())
    thread = watch(controller, restart_s=5)
    os.kill(hung, signal.SIGSTOP)
    assert ray.get(controller.process_id.remote(), timeout=120) != hung
    assert thread.is_alive()


def test_an_actor_that_hangs_in_its_constructor_is_started_anew(watch: Watch, tmp_path: Path) -> None:
    controller = Controller.options(max_restarts=-1, max_task_retries=-1).remote(tmp_path / "started")
    watch(controller, restart_s=5)
    assert ray.get(controller.process_id.remote(), timeout=120)
