"""`detox-ray serve`: the service in the foreground, on a local Ray or a running one."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from detox_ray.cluster import OBJECT_STORE_BYTES
from detox_ray.errors import ConfigError
from detox_ray.serving.api_config import ApiConfig, HttpConfig

APP_NAME = "toxicity-api"


def serve_api(config: ApiConfig, on_ready: Callable[[str], None], stop: threading.Event | None = None) -> None:
    """Serves until SIGINT or SIGTERM (or until `stop` is set), then finishes what is under way and stops.

    `on_ready` is told the address once the service takes requests.

    Raises:
        ConfigError, ModelError, DataError: as `build_http_app`; or the port is taken.
    """
    import ray
    from ray import serve

    from detox_ray.serving.http_api import GRACE_S, build_http_app

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    address = config.ray.address or os.environ.get("RAY_ADDRESS") or "local"
    ours = not ray.is_initialized()
    if ours:
        local: dict[str, Any] = {}
        if address == "local":
            _check_port(config.http)
            local = {
                "num_cpus": config.ray.num_cpus,
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": False,
            }
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        timeout_s = config.limits.body_timeout_s + config.limits.timeout_s + GRACE_S
        serve.start(http_options={"host": config.http.host, "port": config.http.port, "request_timeout_s": timeout_s})
        serve.run(build_http_app(config), name=APP_NAME, route_prefix="/")
        on_ready(f"http://{config.http.host}:{config.http.port}")
        _wait(stop or threading.Event())
        # Replicas finish what they have begun before they stop.
        serve.delete(APP_NAME)
    finally:
        if ours:
            serve.shutdown()
            ray.shutdown()


def _check_port(http: HttpConfig) -> None:
    """Raises ConfigError when nobody can listen there; Serve would try for minutes."""
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    try:
        socket.create_server((http.host, http.port), family=family).close()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"http.host={http.host} http.port={http.port}: {reason}; take another port") from None


def _wait(stop: threading.Event) -> None:
    """Until `stop`, SIGINT or SIGTERM."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: stop.set())
    try:
        stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
