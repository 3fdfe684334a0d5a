"""A process that is stopped at the moment it appears, as one that hangs while it starts."""

import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import psutil


def stop_when_seen(
    title: str, how: signal.Signals = signal.SIGSTOP, times: int = 1, timeout_s: float = 180
) -> Future[list[psutil.Process]]:
    """Send a signal to the first processes below this one that take a title with `title` in it; the result is those."""

    def titled() -> set[psutil.Process]:
        found = set()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.add(process)
        return found

    known = titled()  # by title: an idle process may become what is waited for

    def watch() -> list[psutil.Process]:
        hit: list[psutil.Process] = []
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for process in titled() - known:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(how)
                    known.add(process)
                    hit.append(process)
                    if len(hit) == times:
                        return hit
            time.sleep(0.05)
        raise TimeoutError(f"no process {title!r} appeared")

    executor = ThreadPoolExecutor(1)
    found = executor.submit(watch)
    executor.shutdown(wait=False)
    return found
