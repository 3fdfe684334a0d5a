"""The guard that deletes a dead job's app, on a real Ray and Serve."""

import time
from collections.abc import Callable, Iterator

import pytest
import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from detox_ray.serving.app_guard import NAMESPACE, POLL_S, AppGuard, end_spare_guard, guard_app, is_serve_running

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("local_ray")]

APP, OTHER = "guarded", "other"
DEAD_JOB = "ff00ff00"


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Nothing:
    pass


class GuardOfABusyServe(AppGuard):
    """Serve does not answer it the first time."""

    def __init__(self, app_name: str, job_id: str) -> None:
        delete, errors = serve.delete, iter([TimeoutError("no answer")])

        def answer_later(name: str) -> None:
            for error in errors:
                raise error
            delete(name)

        serve.delete = answer_later
        super().__init__(app_name, job_id)


@pytest.fixture
def app() -> Iterator[None]:
    """An app on a Serve without proxies."""
    serve.shutdown()
    serve.start(proxy_location="Disabled")
    serve.run(Nothing.bind(), name=APP, route_prefix=None)
    yield
    serve.shutdown()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_ended(actor: ActorHandle) -> bool:
    try:
        ray.get(actor.__ray_ready__.remote(), timeout=60)
    except RayActorError:
        return True
    return False


@pytest.mark.parametrize("guard", [AppGuard, GuardOfABusyServe])
def test_a_dead_jobs_app_goes_and_with_the_last_app_serve_and_the_guard(guard: type[AppGuard], app: None) -> None:
    actor = ray.remote(guard).options(num_cpus=0).remote(APP, DEAD_JOB)
    wait_until(lambda: not is_serve_running())
    wait_until(lambda: has_ended(actor))


def test_a_living_jobs_app_stays_and_its_last_guard_too(app: None) -> None:
    def guards() -> set[str]:
        actors = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"].partition(" ")[2] for actor in actors if actor["namespace"] == NAMESPACE}

    guard_app(APP)
    guard_app(OTHER)
    time.sleep(3 * POLL_S)
    assert APP in serve.status().applications
    end_spare_guard(APP)
    wait_until(lambda: guards() == {OTHER})
    end_spare_guard(OTHER)
    assert guards() == {OTHER}
    ray.kill(ray.get_actor(f"{ray.get_runtime_context().get_job_id()} {OTHER}", namespace=NAMESPACE))
