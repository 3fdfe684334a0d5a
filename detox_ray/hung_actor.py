"""An actor that hangs without dying: Ray and who asks it would wait for ever, so somebody has to look."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

logger = logging.getLogger(__name__)

POLL_S = 5.0


def kill_when_hung(
    actor: Any,
    name: str,
    timeout_s: float,
    ended: threading.Event,
    restart_s: float | None = None,
    may_wait: Callable[[], bool] = lambda: False,
) -> None:
    """Kill an asyncio actor that does not answer for `timeout_s`; returns once that happened, or `ended` is set.

    With `restart_s` Ray restarts the actor, which may take that long (so may the start in progress), and watching
    continues. Silence does not count while `may_wait()`.
    """
    answer, asked = actor.__ray_ready__.remote(), time.monotonic() + (restart_s or 0.0)
    while not ended.wait(POLL_S):
        if ray.wait([answer], timeout=0)[0]:
            answer, asked = actor.__ray_ready__.remote(), time.monotonic()
        elif may_wait():
            asked = time.monotonic()
        elif time.monotonic() - asked > timeout_s:
            logger.warning("%s has not answered for %.0f s and is killed", name, timeout_s)
            ray.kill(actor, no_restart=restart_s is None)
            if restart_s is None:
                return
            answer, asked = actor.__ray_ready__.remote(), time.monotonic() + restart_s
