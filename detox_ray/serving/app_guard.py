"""On a cluster Serve outlives the command that deployed to it: what a run deployed goes once the run ends or dies."""

import logging
import threading
import time
from contextlib import suppress

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

logger = logging.getLogger(__name__)

NAMESPACE = "detox_ray"
POLL_S = 1.0


class AppGuard:
    """Deletes an app once the job that deployed it is dead; started anew, it goes on watching."""

    def __init__(self, app_name: str, job_id: str) -> None:
        self._app_name = app_name
        self._job_id = job_id
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        guard = ray.get_runtime_context().current_actor
        while not self._is_done():
            time.sleep(POLL_S)
        ray.kill(guard)

    def _is_done(self) -> bool:
        """Whether the job is dead and the app deleted, which is tried again when Ray or Serve cannot answer."""
        try:
            if self._job_id in _jobs_alive():
                return False
            with suppress(RayServeException):  # Serve is gone, or was not even started
                serve.delete(self._app_name)
                stop_idle_serve()
        except Exception:
            logger.warning("cannot delete the app %r yet", self._app_name, exc_info=True)
            return False
        return True


def guard_app(app_name: str) -> None:
    """Have an app that this job is about to deploy deleted once the job is dead, however it came to that.

    With the last app goes Serve itself, unless it has HTTP proxies: then it is a service of somebody else's.
    """
    job_id = ray.get_runtime_context().get_job_id()
    actor = ray.remote(AppGuard).options(
        name=f"{job_id} {app_name}", namespace=NAMESPACE, lifetime="detached", num_cpus=0, max_restarts=-1
    )
    actor.remote(app_name, job_id)


def end_spare_guard(app_name: str) -> None:
    """Kill the guard of a deleted app, unless it is the job's last: that one still has to stop Serve."""
    job_id = ray.get_runtime_context().get_job_id()
    guards = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    if sum(name.startswith(f"{job_id} ") for name in guards) > 1:
        with suppress(ValueError):  # there is none
            ray.kill(ray.get_actor(f"{job_id} {app_name}", namespace=NAMESPACE))


def is_serve_running() -> bool:
    """Whether anybody has started Serve on this Ray."""
    return any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True))


def stop_idle_serve() -> None:
    """Shut Serve down if it has neither apps nor proxies, and no job that is alive has a guarded app."""
    guarded = {
        actor["name"].partition(" ")[0]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE
    }
    if is_serve_running() and guarded.isdisjoint(_jobs_alive()):
        status = serve.status()
        if not status.applications and not status.proxies:
            serve.shutdown()


def _jobs_alive() -> set[str]:
    from ray._private.state import state

    return {job["JobID"] for job in state.job_table() if not job["IsDead"]}
