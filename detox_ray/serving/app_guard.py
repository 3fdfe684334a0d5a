"""On a cluster Serve outlives the command that deployed to it; what a run deployed goes when the run goes, or dies."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

NAMESPACE = "detox_ray"
POLL_S = 1.0


class AppGuard:
    """Deletes an app once the driver that deployed it is gone; started anew, it goes on watching."""

    def __init__(self, app_name: str, job_id: str) -> None:
        self._app_name = app_name
        self._job_id = job_id
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        from ray._private.state import state

        context = ray.get_runtime_context()
        while any(job["JobID"] == self._job_id and not job["IsDead"] for job in state.job_table()):
            time.sleep(POLL_S)
        with suppress(RayServeException):  # Serve was not even started
            serve.delete(self._app_name)
        stop_idle_serve(self._app_name)
        ray.kill(context.current_actor)


@contextmanager
def guarded_app(app_name: str) -> Iterator[None]:
    """An app that is deployed in here, on a cluster, is gone afterwards, also when this process is killed.

    With the last one goes Serve itself, unless it has HTTP proxies: then it is a service of somebody else's.
    """
    context = ray.get_runtime_context()
    options = {"name": _guard_name(app_name), "namespace": NAMESPACE, "lifetime": "detached"}
    guard: Any = (
        ray.remote(AppGuard).options(num_cpus=0, max_restarts=-1, **options).remote(app_name, context.get_job_id())
    )
    try:
        yield
    finally:
        stop_idle_serve(app_name)
        ray.kill(guard)


def is_serve_running() -> bool:
    """Whether anybody has started Serve on this Ray."""
    return any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True))


def stop_idle_serve(app_name: str) -> None:
    """Shut Serve down if it has neither apps nor proxies, and no run but that of `app_name` is about to deploy one."""
    others = {
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and actor["name"] != _guard_name(app_name)
    }
    if is_serve_running() and not others:
        status = serve.status()
        if not status.applications and not status.proxies:
            serve.shutdown()


def _guard_name(app_name: str) -> str:
    return f"guard-of-{app_name}"
