"""Serve with its HTTP proxy for the length of a command, on a local Ray or a running one."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from detox_ray.cluster import connect, starts_own_ray
from detox_ray.config import RayConfig
from detox_ray.errors import ConfigError

CONTROLLER_TIMEOUT_S = 30.0  # after which a Serve controller that does not answer is killed and started anew


@contextmanager
def serve_session(ray_config: RayConfig, host: str, port: int, request_timeout_s: float | None) -> Iterator[str]:
    """Ray and Serve, listening; yields the address. What was started is shut down at the end, and only that.

    On a cluster the caller deletes its app; Serve stays there if it ran before or others have deployed to it since.

    Raises:
        ConfigError: as `connect`, or the port is taken, or Serve already listens elsewhere or not at all.
    """
    import ray
    from ray import serve

    from detox_ray.serving.app_guard import is_serve_running
    from detox_ray.serving.controller_watch import controller_watched

    ours, starts_own = not ray.is_initialized(), starts_own_ray(ray_config)
    if starts_own:
        check_port(host, port)
    connect(ray_config)
    found = is_serve_running()
    try:
        with controller_watched(CONTROLLER_TIMEOUT_S):
            serve.start(http_options={"host": host, "port": port, "request_timeout_s": request_timeout_s})
            if found:
                check_listening(host, port)
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        if ours and (starts_own or not (found or serve.status().applications)):
            serve.shutdown()
        if ours:
            ray.shutdown()


@contextmanager
def deleted_at_the_end(app_name: str) -> Iterator[None]:
    """Deletes the app, also when it does not start; its replicas finish what they have begun before they stop."""
    from ray import serve

    try:
        yield
    except BaseException:
        # What went wrong first is what is told.
        with suppress(Exception):
            serve.delete(app_name)
        raise
    serve.delete(app_name)


def check_listening(host: str, port: int) -> None:
    """Raises ConfigError unless the Serve that runs listens there; it keeps the options it was started with."""
    from ray import serve
    from ray.serve.context import _get_global_client

    running, client = "without HTTP", _get_global_client()
    if client is not None and serve.status().proxies:
        running = f"on {client.http_config.host}:{client.http_config.port}"
    if running != f"on {host}:{port}":
        raise ConfigError(
            f"http.host={host} http.port={port}: Serve already runs {running} on this Ray; ask for the same, or stop it"
        )


def check_replaces_nothing(app_name: str, route_prefix: str) -> None:
    """Raises ConfigError if Serve has an app of this name, which ours would replace, or another one on the route."""
    from ray.serve.context import _get_global_client

    if (client := _get_global_client()) is None:
        return
    for name, app in client.get_serve_details()["applications"].items():
        if name == app_name or app["route_prefix"] == route_prefix:
            raise ConfigError(
                f"Serve on this Ray already has the app {name!r} at {app['route_prefix']}: stop it where it was "
                f"started or with serve.delete({name!r}), or unset RAY_ADDRESS and ray.address for a Ray of your own"
            )


def wait_for_proxies() -> None:
    """Until every HTTP proxy routes requests to the apps that run."""
    from ray.serve.context import _get_global_client

    if (client := _get_global_client()) is not None:
        client.wait_for_proxies_serving()


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when nobody can listen there; Serve would try for minutes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"http.host={host} http.port={port}: {reason}; take another port") from None


def wait_until_stopped(stop: threading.Event | None = None) -> None:
    """Until SIGINT or SIGTERM, or until `stop` is set."""
    stop = stop or threading.Event()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: stop.set())
    try:
        stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
