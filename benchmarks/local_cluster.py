"""A Ray cluster of several nodes on this machine, which may lose any but its head."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

START_TIMEOUT_S = 120


class LocalCluster:
    """A head, which takes no workers, and `nodes` nodes of `cpus` CPUs each; `processes` are theirs, the head first.

    This process, and what it starts, can connect to `address` from now on.
    """

    def __init__(self, nodes: int, cpus: int, log: Path) -> None:
        self._nodes, self._cpus, self._log = nodes, cpus, log
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")  # sockets' paths must be short
        self._port = _free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.processes: list[psutil.Process] = []
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def start(self) -> None:
        """The head, then the nodes."""
        head = ["--head", "--port", str(self._port), "--num-cpus", "0", "--include-dashboard", "false"]
        self._start(*head, "--temp-dir", self._folder.name)
        self.replace_lost()

    def replace_lost(self) -> None:
        """Start a node for each that is gone."""
        self.processes = [self.processes[0], *(p for p in self.processes[1:] if p.is_running() and _has_raylet(p))]
        while len(self.processes) <= self._nodes:
            self._start("--address", self.address, "--num-cpus", str(self._cpus))

    def stop(self) -> None:
        """All of it."""
        family = [child for node in self.processes for child in (node, *node.children(recursive=True))]
        for process in reversed(family):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, left = psutil.wait_procs(family, timeout=20)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._folder.cleanup()

    def _start(self, *options: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address", "127.0.0.1"]
        size = ["--object-store-memory", str(2 * 10**8), "--dashboard-agent-listen-port", "0"]
        with self._log.open("a", encoding="utf-8") as log:
            written = log.tell()
            self.processes.append(psutil.Popen([*command, *size, *options], stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + START_TIMEOUT_S
        while b"Ray runtime started" not in self._log.read_bytes()[written:]:
            if time.monotonic() > deadline or self.processes[-1].poll() is not None:
                sys.exit(f"FAILED: a node does not start; see {self._log}")
            time.sleep(0.2)


def _has_raylet(node: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any(p.name() == "raylet" and p.status() != psutil.STATUS_ZOMBIE for p in node.children())
    return False


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])
