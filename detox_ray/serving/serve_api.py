"""`detox-ray serve`: the service in the foreground, on a local Ray or a running one."""

import threading
from collections.abc import Callable

from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.foreground import serve_session, wait_until_stopped

APP_NAME = "toxicity-api"


def serve_api(config: ApiConfig, on_ready: Callable[[str], None], stop: threading.Event | None = None) -> None:
    """Serves until SIGINT or SIGTERM (or until `stop` is set), then finishes what is under way and stops.

    `on_ready` is told the address once the service takes requests.

    Raises:
        ConfigError, ModelError, DataError: as `build_http_app`; or the port is taken.
    """
    from ray import serve

    from detox_ray.serving.http_api import GRACE_S, build_http_app

    timeout_s = config.limits.body_timeout_s + config.limits.timeout_s + GRACE_S
    with serve_session(config.ray, config.http.host, config.http.port, timeout_s) as address:
        serve.run(build_http_app(config), name=APP_NAME, route_prefix="/")
        on_ready(address)
        wait_until_stopped(stop)
        # Replicas finish what they have begun before they stop.
        serve.delete(APP_NAME)
