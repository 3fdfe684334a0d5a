"""Serve's controller, watched: Ray restarts one that dies, but nobody notices one that hangs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from detox_ray.hung_actor import kill_when_hung

POLL_S = 1.0
SHORTEST_PATIENCE_S = 10.0  # a controller shared with others may be busy so long
RESTART_S = 60.0  # within which the controller is back after a kill


@contextmanager
def controller_watched(timeout_s: float) -> Iterator[None]:
    """Kill a controller that does not answer for `timeout_s`; its successor goes on with what there is.

    To be entered before `serve.start`, which waits for a controller without end.
    """
    ended = threading.Event()
    threading.Thread(target=_watch, args=(timeout_s, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(timeout_s: float, ended: threading.Event) -> None:
    """`kill_when_hung`, from the moment there is a controller."""
    while not ended.wait(POLL_S):
        try:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            continue  # not yet
        kill_when_hung(controller, "Serve's controller", timeout_s, ended, RESTART_S)
