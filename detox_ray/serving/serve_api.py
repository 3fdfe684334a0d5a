"""`detox-ray serve`: the service in the foreground, on a local Ray or a running one."""

import threading
from collections.abc import Callable

from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.foreground import deleted_at_the_end, serve_session, wait_until_stopped

APP_NAME = "toxicity-api"


def serve_api(config: ApiConfig, on_ready: Callable[[str], None], stop: threading.Event | None = None) -> None:
    """Serves until SIGINT or SIGTERM (or until `stop` is set), then finishes what is under way and stops.

    `on_ready` is told the address once the service takes requests.

    Raises:
        ConfigError, ModelError, DataError: as `build_http_app`; or as `serve_session`.
    """
    from ray import serve

    from detox_ray.serving.http_api import GRACE_S, build_http_app

    timeout_s = config.limits.body_timeout_s + config.limits.timeout_s + GRACE_S
    with serve_session(config.ray, config.http.host, config.http.port, timeout_s) as address:
        app = build_http_app(config)
        with deleted_at_the_end(APP_NAME):
            serve.run(app, name=APP_NAME, route_prefix="/")
            on_ready(address)
            wait_until_stopped(stop)
