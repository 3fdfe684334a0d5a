"""`detox-ray serve`: the service in the foreground, on a local Ray or a running one."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from detox_ray.cluster import check_capacity, local_capacity, starts_own_ray
from detox_ray.placement import RoleResources, check_placements, classifier_placement
from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.foreground import (
    check_replaces_nothing,
    deleted_at_the_end,
    serve_session,
    wait_for_proxies,
    wait_until_stopped,
)

APP_NAME = "toxicity-api"
ROUTE = "/"


def serve_api(config: ApiConfig, on_ready: Callable[[str], None], stop: threading.Event | None = None) -> None:
    """Serves until SIGINT or SIGTERM (or until `stop` is set), then finishes what is under way and stops.

    `on_ready` is told the address once the service takes requests.

    Raises:
        ConfigError, ModelError, DataError: as `build_http_app`, `serve_session` or `check_replaces_nothing`; or Ray can
            never have what the classifiers need.
        RewardError: a classifier does not start, or not within `reward.start_timeout_s`.
    """
    from detox_ray.serving.deploy import deploy_in_background, wait_until_running
    from detox_ray.serving.http_api import GRACE_S, build_http_app

    needed = service_placements(config)
    if starts_own_ray(config.ray):
        check_placements(needed, local_capacity(config.ray))  # before anything is started
    timeout_s = config.limits.body_timeout_s + config.limits.timeout_s + GRACE_S
    with serve_session(config.ray, config.http.host, config.http.port, timeout_s) as address:
        check_capacity(config.ray, partial(check_placements, needed))
        check_replaces_nothing(APP_NAME, ROUTE)
        app = build_http_app(config)
        with deleted_at_the_end(APP_NAME):
            deploy_in_background(app, APP_NAME, ROUTE)
            wait_until_running(APP_NAME, config.reward.start_timeout_s)
            wait_for_proxies()
            on_ready(address)
            wait_until_stopped(stop)


def service_placements(config: ApiConfig) -> list[RoleResources]:
    """What the replicas take that are always there; HTTP replicas take nothing."""
    needed = []
    for number, classifier in enumerate(config.reward.classifiers):
        scaling = config.replicas.get(classifier.name)
        placed = classifier_placement(classifier, number)
        needed.append(placed if scaling is None else replace(placed, count=scaling.min))
    return needed
