"""What a session on Ray does when its node dies under it."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.e2e
WAITING = """
import sys, time
from pathlib import Path

import ray

from detox_ray.cluster import ray_session
from detox_ray.config import RayConfig


class Waiting:
    def wait(self):
        time.sleep(3600)


if __name__ == "__main__":
    with ray_session(RayConfig(num_cpus=1), lambda capacity: None, Path(sys.argv[1]) / "logs"):
        kept = {"lifetime": "detached", "namespace": "other", "name": "waiting"}  # as Serve's controller is
        actor = ray.remote(Waiting).options(**kept, max_restarts=-1, max_task_retries=-1).remote()
        ray.get(actor.__ray_ready__.remote())
        print("waiting", flush=True)
        try:
            ray.get(actor.wait.remote())
        finally:
            ray.get(actor.wait.remote())  # cleaning up that waits as well
"""


def test_a_dead_node_ends_what_would_wait_for_ever(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    driver = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, str(script), str(tmp_path)],  # as in a background
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "waiting\n"
    [raylet] = [p for p in psutil.Process(driver.pid).children() if p.name() == "raylet"]
    raylet.send_signal(signal.SIGKILL)
    _, error = driver.communicate(timeout=100)
    assert "NodeDiedError: the node of this process died" in error
    assert driver.returncode == 1
