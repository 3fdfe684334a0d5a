"""Connect to Ray, or start a local one, and leave it as it was found."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from detox_ray.config import RayConfig
from detox_ray.errors import ConfigError, first_line
from detox_ray.placement import Capacity, RoleResources, shortage
from detox_ray.terminal import Terminal

OBJECT_STORE_BYTES = 512 * 2**20
CONNECT_TIMEOUT_S = 10.0
# What each node must answer before anything is placed on it; starting a worker process takes seconds.
NODE_TIMEOUT_S = 60.0
NODE_POLL_S = 5.0
INTERRUPT = signal.SIGUSR2  # not SIGINT, which a command in the background of a script ignores


def local_capacity(config: RayConfig) -> Capacity:
    """What a local Ray of this configuration would have, without starting it."""
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    logging.getLogger("ray").setLevel(logging.ERROR)  # it would tell at length of a container's limits
    return Capacity([ResourceAndLabelSpec(num_cpus=config.num_cpus).resolve(is_head=True).to_resource_dict()])


def local_memory() -> tuple[int, int]:
    """(all, left) of this machine's main memory in bytes, or of its container's, where that is less."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import estimate_available_memory

    return get_system_memory(), min(psutil.virtual_memory().available, estimate_available_memory())


def cluster_capacity(config: RayConfig) -> Capacity:
    """What the nodes of the connected Ray have; what an autoscaler could add to them it does not tell."""
    import ray

    return Capacity([node["Resources"] for node in ray.nodes() if node["Alive"]], config.autoscaling)


def check_capacity(config: RayConfig, check: Callable[[Capacity], None]) -> None:
    """Raises:
    ConfigError: `check` refuses what the connected Ray has.
    """
    try:
        check(cluster_capacity(config))
    except ConfigError as error:
        if started_here():
            raise
        hint = "where an autoscaler starts nodes when they are asked for, set ray.autoscaling=true"
        raise ConfigError(f"{error}; {hint}") from None


def cluster_address(config: RayConfig) -> str | None:
    """The cluster to connect to: `ray.address`, else the one a submitted job runs on, else none (a local Ray)."""
    return config.address or os.environ.get("RAY_ADDRESS") or None


def starts_own_ray(config: RayConfig) -> bool:
    """Whether a session starts a local Ray: the caller is connected to none, and there is no cluster to connect to."""
    import ray

    return cluster_address(config) is None and not ray.is_initialized()


def started_here() -> bool:
    """Whether this process started the Ray that it is connected to: no autoscaler adds to it, and it ends with it."""
    from ray._private import worker

    return worker._global_node is not None and worker._global_node.is_head()


def connect(config: RayConfig) -> None:
    """Connect to the cluster, or start a local Ray where there is none; the caller's own, if it has one, is kept.

    Raises:
        ConfigError: the address does not answer, or Ray there is another version or refuses this process.
    """
    import ray

    for name in ("ray", "ray.serve", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    check_cluster_answers(config)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if (address := cluster_address(config)) is None:
        local = quiet | {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        ray.init(address="local", num_cpus=config.num_cpus, **local)
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(_refusal(address, f"{error}\n{error.__cause__ or ''}")) from None


@contextmanager
def ray_session(config: RayConfig, check: Callable[[Capacity], None], logs: Path) -> Iterator[bool]:
    """Ray for the length of a run; a local one is shut down at the end, a cluster is left running.

    Yields whether this Ray outlives the process, and with it what is left on it, such as Serve.

    `check` is given what Ray has and refuses what does not fit; `logs`, in the run's folder, becomes a link to the logs
    of the Ray session, where everything the workers print goes.

    Raises:
        ConfigError: as `connect`, or Ray there has less than the run needs, or nodes that do not see the run's folder.
        NodeDiedError: Ray's, see `interrupted_without_node`.
    """
    import ray

    theirs = ray.is_initialized()  # the caller's, say a notebook's: use it and leave it
    if starts_own_ray(config):
        check(local_capacity(config))
        # Ray Train would ask, in a process of its own, whether the only node is about to be taken away.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    connect(config)
    if theirs:
        check_capacity(config, check)
        check_nodes_see(logs.parent)
        yield not started_here()
        return
    try:
        check_capacity(config, check)
        check_nodes_see(logs.parent)
        found = ray.get_runtime_context()
        link_logs(logs, Path(found.get_temp_dir()) / found.get_session_name() / "logs")
        with interrupted_without_node(found.get_node_id()):
            yield not started_here()
    finally:
        ray.shutdown()


@contextmanager
def interrupted_without_node(node: str) -> Iterator[None]:
    """End the block when the node that this process is on has died: what asks a lost actor then would wait for ever.

    Only in the main thread, which alone can be interrupted.

    Raises:
        NodeDiedError: Ray's, at the latest a minute after the node died.
    """
    import ray
    from ray.exceptions import NodeDiedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended, main, lost = threading.Event(), threading.get_ident(), threading.Event()

    def is_lost() -> bool:
        with suppress(Exception):  # whoever keeps the list of nodes may be busy, or about to be lost too
            return any(found["NodeID"] == node and not found["Alive"] for found in ray.nodes())
        return False

    def watch() -> None:
        while not ended.wait(NODE_POLL_S):
            if is_lost():
                lost.set()
                signal.pthread_kill(main, INTERRUPT)  # and again, should cleaning up wait for ever too

    def interrupt(*_: object) -> None:
        if not ended.is_set():
            raise KeyboardInterrupt  # the one exception that gets out of Ray's own waiting

    before = signal.signal(INTERRUPT, interrupt)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        ended.set()
        if lost.is_set():
            raise NodeDiedError("the node of this process died") from None
        raise
    finally:
        ended.set()
        signal.signal(INTERRUPT, before or signal.SIG_DFL)


def check_nodes_see(folder: Path) -> None:
    """Ask every node but this one for what was just written into the folder: learners and rollout workers use it.

    Raises:
        ConfigError: a node has another folder there or none, cannot write to it, or does not answer.
    """
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here}
    if not others:
        return
    written = uuid4().hex
    probe = folder / f".seen-{written}"  # a new name, which no node remembers as absent
    ask = ray.remote(num_cpus=0, max_retries=0)(_text_where_writable)
    try:
        probe.write_text(written, encoding="utf-8")
        answers = [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(str(probe))
            for node in others
        ]
        for address, answer in zip(others.values(), answers, strict=True):
            if ray.get(answer, timeout=NODE_TIMEOUT_S) != written:
                raise ConfigError(
                    f"output_dir: node {address} of the cluster cannot write to {folder}, or has a folder of its own "
                    "there; choose one on storage that every node mounts at the same path"
                )
    except GetTimeoutError:
        raise ConfigError(
            f"node {address} of the cluster does not start a process within {NODE_TIMEOUT_S:g} s; see `ray status`"
        ) from None
    finally:
        probe.unlink(missing_ok=True)


def announce_shortage(needed: Sequence[RoleResources], terminal: Terminal) -> None:
    """Say what the run has to wait for because others on the cluster hold it, if there is such."""
    import ray

    if (missing := shortage(needed, ray.available_resources())) is not None:
        terminal.stage(missing)


def _text_where_writable(path: str) -> str | None:
    """The content of a file; None, where there is none or its folder cannot be written."""
    with suppress(OSError):
        if os.access(Path(path).parent, os.W_OK):
            return Path(path).read_text(encoding="utf-8")
    return None


def link_logs(link: Path, logs: Path) -> None:
    """Make `link` point to the logs of a Ray session on this machine, where that is possible."""
    with suppress(OSError):
        link.unlink(missing_ok=True)
        link.symlink_to(logs)


def check_cluster_answers(config: RayConfig) -> None:
    """Ask the cluster's port, if there is a cluster, before Ray does, which would wait for a minute.

    Raises:
        ConfigError: nobody answers there, or not Ray.
    """
    address = cluster_address(config)
    if address is None:
        return
    if "://" in address:
        raise ConfigError(
            f"ray.address={address}: a run's driver must be in the cluster; give the head node's host:port, or submit: "
            "`ray job submit --working-dir . -- detox-ray train ...`"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(_no_answer(address, error.strerror or str(error))) from None
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    with init_grpc_channel(f"{host}:{port}") as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=CONNECT_TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(_refusal(address, "InvalidAuthToken")) from None
            raise ConfigError(_no_answer(address, "something else than Ray listens there")) from None


def _refusal(address: str, reason: str) -> str:
    """Why `ray.init` did not connect, in one line."""
    if "Version mismatch" in reason:
        versions = [line.strip() for line in reason.splitlines() if "Ray: " in line or "Python: " in line]
        theirs, ours = ", ".join(versions[:2]), ", ".join(versions[2:])
        return f"ray.address={address} runs {theirs}, and this process has {ours}; use the cluster's"
    if "InvalidAuthToken" in reason:
        return (
            f"ray.address={address} refuses this process's token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the "
            "cluster's (on its head: `ray get-auth-token`), or put it into ~/.ray/auth_token"
        )
    return _no_answer(address, first_line(reason))


def _no_answer(address: str, reason: str) -> str:
    return (
        f"ray.address={address} does not answer ({reason}); start it with `ray start --head`, or leave ray.address out "
        "for a local Ray"
    )
