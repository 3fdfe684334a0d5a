"""Connect to Ray, or start a local one, and leave it as it was found."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from detox_ray.config import Config, LearnerConfig, RayConfig, RolloutConfig
from detox_ray.errors import ConfigError

OBJECT_STORE_BYTES = 512 * 2**20
CONNECT_TIMEOUT_S = 10.0


def cpus_needed(config: Config) -> float:
    """Ray CPUs of rollout workers, learners and classifier replicas together."""
    classifiers = sum(c.num_cpus * c.replicas for c in config.reward.classifiers)
    return config.rollout.workers * config.rollout.num_cpus + config.train.workers * config.train.num_cpus + classifiers


def gpus_needed(config: Config) -> float:
    """Ray GPUs, likewise."""
    classifiers = sum(c.num_gpus * c.replicas for c in config.reward.classifiers)
    return config.rollout.workers * config.rollout.num_gpus + config.train.workers * config.train.num_gpus + classifiers


def check_resources(config: Config, available: dict[str, float]) -> None:
    """Refuse a configuration that would wait for ever for CPUs or GPUs.

    Raises:
        ConfigError: more is needed than there is.
    """
    for kind, needed in (("CPU", cpus_needed(config)), ("GPU", gpus_needed(config))):
        if needed > available.get(kind, 0) + 1e-6:
            lower = kind.lower()
            raise ConfigError(
                f"this run needs {needed:g} {kind}s ({config.rollout.workers} rollout workers x "
                f"{getattr(config.rollout, f'num_{lower}s'):g}, {config.train.workers} learners x "
                f"{getattr(config.train, f'num_{lower}s'):g}, the rest classifiers) and Ray has "
                f"{available.get(kind, 0):g}; lower rollout.workers or num_{lower}s of rollout, train, classifiers"
            )


def check_rollout_resources(rollout: RolloutConfig, available: dict[str, float]) -> None:
    """As `check_resources`, of rollout workers alone.

    Raises:
        ConfigError: more is needed than there is.
    """
    _check_workers("rollout workers", "rollout", rollout, available)


def check_learner_resources(learners: LearnerConfig, available: dict[str, float]) -> None:
    """As `check_resources`, of learners alone.

    Raises:
        ConfigError: more is needed than there is.
    """
    _check_workers("learners", "train", learners, available)


def _check_workers(what: str, section: str, config: RolloutConfig | LearnerConfig, available: dict[str, float]) -> None:
    for kind, each in (("CPU", config.num_cpus), ("GPU", config.num_gpus)):
        if config.workers * each > available.get(kind, 0) + 1e-6:
            raise ConfigError(
                f"{config.workers} {what} x {each:g} need {config.workers * each:g} {kind}s and Ray has "
                f"{available.get(kind, 0):g}; lower {section}.workers or {section}.num_{kind.lower()}s"
            )


def local_resources(config: RayConfig) -> dict[str, float]:
    """What a local Ray of this configuration would have, without starting it."""
    import torch

    return {"CPU": config.num_cpus or psutil.cpu_count() or 1, "GPU": torch.cuda.device_count()}


def cluster_address(config: RayConfig) -> str | None:
    """The cluster to connect to: `ray.address`, else the one a submitted job runs on, else none (a local Ray)."""
    return config.address or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def ray_session(config: RayConfig, check: Callable[[dict[str, float]], None], log_folder: Path) -> Iterator[None]:
    """Ray for the length of a run; a local one is shut down at the end, a cluster is left running.

    `check` is given what Ray has (`{"CPU": ..., "GPU": ...}`) and refuses what does not fit; `log_folder` becomes a
    link to the logs of the Ray session, where everything the workers print goes.

    Raises:
        ConfigError: the address does not answer, or Ray has fewer CPUs or GPUs than the run needs.
    """
    import ray

    for name in ("ray", "ray.serve", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    address = cluster_address(config)
    if address is not None:
        _check_answers(address)
    if ray.is_initialized():
        # The caller's own Ray, say a notebook's: use it and leave it.
        check(ray.cluster_resources())
        yield
        return
    if address is None:
        check(local_resources(config))
        ray.init(
            address="local",
            num_cpus=config.num_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(_no_answer(address, str(error).split("\n")[0])) from None
    try:
        check(ray.cluster_resources())
        link_logs(log_folder, ray.get_runtime_context().get_session_name())
        yield
    finally:
        ray.shutdown()


def link_logs(link: Path, session: str) -> None:
    """Make `link` point to the logs of a Ray session on this machine, where that is possible."""
    logs = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / session / "logs"
    with suppress(OSError):
        link.unlink(missing_ok=True)
        link.symlink_to(logs)


def _check_answers(address: str) -> None:
    """Ask the port before Ray does, which would wait for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(_no_answer(address, error.strerror or str(error))) from None


def _no_answer(address: str, reason: str) -> str:
    return (
        f"ray.address={address} does not answer ({reason}); start it with `ray start --head`, or leave ray.address out "
        "for a local Ray"
    )
