"""Runs submitted as jobs to a real cluster of two nodes: placed, apart from each other, and cleaned up after."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from detox_ray.metrics_file import read_metrics

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
SMALL = [
    "rollout.engine=transformers", "rollout.workers=1", "policy.quantization=none", "train.threads=1",
    "ppo.batch_size=16", "ppo.gradient_accumulation=1", "reward.calibration_prompts=16", "evaluation.prompts=4",
    "evaluation.samples_per_prompt=1", "evaluation.every=0", "rollout.resources.rollout_node=1",
    "train.resources.learner_node=1", "reward.classifiers=[{name: lab-linear, kind: linear, model: 'lab:linear'}]",
]  # fmt: skip
TWO_LEARNERS = [
    "train.total_steps=3", "train.workers=2", "train.num_cpus=0.5", "train.shard_base=true", "rollout.workers=2",
    "rollout.max_staleness=1", "rollout.samples_per_prompt=4", "ppo.estimator=rloo",
]  # fmt: skip
STATE = """
import json, ray
from ray._private.state import actors as actor_table
ray.init(log_to_driver=False, logging_level="ERROR")
nodes = {node["NodeID"]: sorted({"rollout_node", "learner_node"} & node["Resources"].keys()) for node in ray.nodes()}
actors = [
    [actor["ActorClassName"], nodes[actor["Address"]["NodeID"]], actor["Name"]]
    for actor in actor_table().values() if actor["State"] == "ALIVE"
]
groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
print(json.dumps({"actors": actors, "groups": len(groups), "free": ray.available_resources()}))
"""
BYSTANDER = """
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
@ray.remote(num_cpus=0)
class Bystander:
    def greet(self):
        return "hello"
actor = Bystander.options(name="bystander", namespace="others", lifetime="detached").remote()
assert ray.get(actor.greet.remote()) == "hello"
"""
Command = Callable[..., subprocess.CompletedProcess[str]]


def free_port() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return str(unused.getsockname()[1])


def wait_for(found: Callable[[], Any], what: str, timeout_s: float = 600) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (result := found()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.5)
    return result


@pytest.fixture(scope="module")
def on_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A head that has learners and a node that has rollout workers; yields how to run a command against them."""
    bin_folder = Path(sys.executable).parent
    # Ray's sockets lie under its folder, and their paths may have 107 characters.
    folder = Path("/tmp") / f"detox-{secrets.token_hex(3)}"
    port, dashboard = free_port(), free_port()
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    common = [
        "ray", "start", "--block", "--node-ip-address", "127.0.0.1", "--num-cpus", "4",
        "--object-store-memory", str(2 * 10**8), "--dashboard-agent-listen-port", "0",
    ]  # fmt: skip
    # Nodes of one machine would share what is unpacked for a job, and delete it under each other.
    head = [
        *common, "--temp-dir", str(folder / "a"), "--head", "--port", port, "--dashboard-port", dashboard,
        "--include-dashboard", "true", "--ray-client-server-port", free_port(), "--resources", '{"learner_node": 3}',
    ]  # fmt: skip
    node = [
        *common, "--temp-dir", str(folder / "b"), "--address", f"127.0.0.1:{port}",
        "--resources", '{"rollout_node": 3}',
    ]  # fmt: skip
    connected = {
        **environment,
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    started: list[psutil.Process] = []
    log_file = tmp_path_factory.mktemp("cluster") / "start.log"
    with log_file.open("w") as log:
        try:
            for number, command in enumerate((head, node), 1):
                started.append(psutil.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
                wait_for(lambda n=number: log_file.read_text().count("Ray runtime started") == n, "Ray", 120)

            def run(*arguments: str, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
                return subprocess.run(
                    arguments, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, check=False, env=connected
                )

            yield run
        finally:
            stop(started)
            shutil.rmtree(folder, ignore_errors=True)


def stop(nodes: list[psutil.Process]) -> None:
    """End the nodes in order, then whatever is left of them at once."""
    processes = [child for node in nodes for child in (node, *node.children(recursive=True))]
    for node in nodes:
        node.terminate()
    _, left = psutil.wait_procs(processes, timeout=5)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=20)


def state_of(on_cluster: Command) -> dict[str, Any]:
    printed = on_cluster(sys.executable, "-c", STATE)
    assert printed.returncode == 0, printed.stderr
    return json.loads(printed.stdout.splitlines()[-1])


def submit(on_cluster: Command, name: str, *arguments: str, wait: bool) -> subprocess.CompletedProcess[str]:
    how = [] if wait else ["--no-wait"]
    command = ["ray", "job", "submit", *how, "--submission-id", name, "--working-dir", ".", "--"]
    return on_cluster(*command, "detox-ray", "train", "configs/laptop.yaml", f"name={name}", *arguments)


def test_two_jobs_at_once_and_one_of_them_stopped(on_cluster: Command, tmp_path: Path) -> None:
    assert on_cluster(sys.executable, "-c", BYSTANDER).returncode == 0
    before = state_of(on_cluster)

    stranger = ["env", f"RAY_AUTH_TOKEN={secrets.token_hex(32)}", "detox-ray", "train", "configs/laptop.yaml"]
    unknown = on_cluster(*stranger, "name=unknown", f"output_dir={tmp_path}")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: ray.address=127.0.0.1:")
    assert "refuses this process's token" in unknown.stderr
    assert len(unknown.stderr.strip().splitlines()) == 1

    refused = submit(on_cluster, "passing", *SMALL, wait=True)
    assert refused.returncode == 1
    assert "failed with exit code 2" in refused.stdout + refused.stderr
    assert "which Ray deletes; take one on storage" in refused.stdout + refused.stderr

    long = submit(on_cluster, "long", f"output_dir={tmp_path}", *SMALL, "train.total_steps=500", wait=False)
    assert long.returncode == 0, long.stderr
    short = submit(on_cluster, "short", f"output_dir={tmp_path}", *SMALL, *TWO_LEARNERS, wait=True)
    assert short.returncode == 0, short.stdout + short.stderr
    assert "step 3/3" in short.stdout
    assert "Mean toxicity" in short.stdout
    lines = read_metrics(tmp_path / "short" / "metrics.jsonl")
    assert [(line["step"], line["staleness"]) for line in lines] == [(0, 0), (1, 1), (2, 1)]
    assert (tmp_path / "short" / "adapter" / "adapter_config.json").exists()
    tensors = load_file(tmp_path / "short" / "adapter" / "adapter_model.safetensors")
    assert all(abs(tensor).max() > 0 for tensor in tensors.values())

    steps = tmp_path / "long" / "metrics.jsonl"
    count = wait_for(lambda: steps.exists() and len(steps.read_text().splitlines()), "a step of the long run")
    wait_for(lambda: len(steps.read_text().splitlines()) > count, "a step after the end of the short run")
    placed = {(kind, *nodes) for kind, nodes, _ in state_of(on_cluster)["actors"]}
    assert {("RolloutWorker", "rollout_node"), ("RayTrainWorker", "learner_node")} <= placed

    stopped = on_cluster("ray", "job", "stop", "long")
    assert stopped.returncode == 0, stopped.stderr

    def remaining() -> dict[str, Any]:
        now = state_of(on_cluster)
        assert before["actors"][0] in now["actors"]
        # Ray Train's coordinator is one for all jobs of a cluster, and stays.
        actors = [actor for actor in now["actors"] if actor[0] not in ("_AutoscalingCoordinatorActor", "Bystander")]
        taken = {
            r: before["free"][r] - now["free"].get(r, 0) for r in before["free"] if r.isupper() or r.endswith("_node")
        }
        return {"actors": actors, "groups": now["groups"], "taken": {r: x for r, x in taken.items() if x > 0.01}}

    started = time.monotonic()
    while any((found := remaining()).values()):
        assert time.monotonic() - started < 300, f"left behind: {found}"
        time.sleep(0.5)
