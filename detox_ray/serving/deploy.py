"""How our apps get onto Serve: with which options, in which environment, and until every replica is ready."""

import re
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from detox_ray.errors import RewardError

# Two OpenMP threads beside another busy process are slower than one.
REPLICA_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
QUIET = {"log_level": "WARNING", "enable_access_log": False}
START_TIMEOUT_S = 900.0
STATUS_POLL_S = 0.3  # an answer takes 17 ms of a core
# What Serve quotes of Ray; the second stands there where the process lives, and cannot make the replica.
PROCESS_LOST = re.compile(r"\b(ActorDiedError|ActorUnavailableError|NodeDiedError|WorkerCrashedError)\b")
CREATION_FAILED = "raised in its creation task"


class NotStartedError(RewardError):
    """A replica does not start, and not for an error of its own: it waits for room, hangs, or its process was lost."""


def deploy_in_background(app: serve.Application, app_name: str, route_prefix: str | None) -> DeploymentHandle:
    """Starts the application; its ingress' handle waits for replicas that are not ready."""
    target = serve.RunTarget(app, name=app_name, route_prefix=route_prefix, logging_config=QUIET)
    [handle] = serve.run_many([target], wait_for_applications_running=False)
    return handle


def wait_until_running(app_name: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Until every replica is ready.

    Raises:
        RewardError: one does not start.
        NotStartedError: it neither starts nor fails for so long, or the process that it was to start in died.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        app = serve.status().applications.get(app_name)
        if app is not None and app.status == ApplicationStatus.RUNNING:
            return
        failed = app is not None and app.status == ApplicationStatus.DEPLOY_FAILED
        if failed or time.monotonic() > deadline:
            waiting = {} if app is None else {n: d for n, d in app.deployments.items() if d.status != "HEALTHY"}
            reasons = "; ".join(f"{name}: {_reason(d.message) or d.status.value}" for name, d in waiting.items())
            found = f"the app {app_name!r} does not start: {reasons or 'no reason given by Serve'}"
            if failed and not any(_is_process_lost(d.message) for d in waiting.values()):
                raise RewardError(found)
            raise NotStartedError(found if failed else f"{found} (waited {timeout_s:g} s)")
        time.sleep(STATUS_POLL_S)


def lifecycle(drain_s: float) -> dict[str, Any]:
    """Deployment options: an update starts new replicas before it stops the old ones."""
    return {
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,  # after three of these a replica that hangs is replaced
        "graceful_shutdown_timeout_s": drain_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_surge_percent": 100,
        "logging_config": QUIET,
    }


def replica_runtime_env() -> dict[str, Any]:
    """The job's runtime environment plus ours; Serve does not merge the two itself."""
    job: Mapping[str, Any] = ray.get_runtime_context().runtime_env if ray.is_initialized() else {}
    return {**job, "env_vars": {**job.get("env_vars", {}), **REPLICA_ENV}}


def _is_process_lost(message: str) -> bool:
    return bool(PROCESS_LOST.search(message)) and CREATION_FAILED not in message


def _reason(message: str) -> str:
    """The last line of a traceback, without the name of our own error classes; of Ray's own, what it comes to."""
    if _is_process_lost(message):
        return "its process dies while it starts, maybe for want of memory"
    return re.sub(r"^detox_ray\.errors\.\w+: ", "", message.strip().split("\n")[-1].strip())
