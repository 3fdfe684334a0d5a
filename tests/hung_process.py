"""A process that is stopped at the moment it appears, as one that hangs while it starts."""

import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import psutil


def stop_when_seen(title: str, timeout_s: float = 60) -> Future[psutil.Process]:
    """Stop the first new process below this one whose title has `title` in it; the result is that process."""
    this = psutil.Process()
    known = set(this.children(recursive=True))

    def watch() -> psutil.Process:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for process in set(this.children(recursive=True)) - known:
                with suppress(psutil.NoSuchProcess):
                    if title in " ".join(process.cmdline()):
                        process.send_signal(signal.SIGSTOP)
                        return process
            time.sleep(0.02)
        raise TimeoutError(f"no process {title!r} appeared")

    executor = ThreadPoolExecutor(1)
    found = executor.submit(watch)
    executor.shutdown(wait=False)
    return found
