"""What a session on Ray does when its node dies under it."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from detox_ray.cluster import _refusal

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


# What Ray 2.60 says to a cluster of Ray 2.50.
MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.50.0
    Python: 3.11.7
This process on node 127.0.0.1 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


@pytest.mark.unit
def test_a_cluster_of_another_version_is_named_with_both() -> None:
    line = _refusal("127.0.0.1:6379", MISMATCH)
    assert "runs Ray: 2.50.0, Python: 3.11.7, and this process has Ray: 2.60.0, Python: 3.11.7" in line


@pytest.mark.e2e
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
