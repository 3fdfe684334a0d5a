"""Texts of concurrent requests put together, so that a classifier reads lists."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

R = TypeVar("R")


class TextBatcher(Generic[R]):
    """Calls `read` with the texts of several requests at once; nothing waits while fewer than `in_flight` calls run.

    Not `@serve.batch`: that makes a lone request wait for others, and does not keep the order of requests of
    different lengths.
    """

    def __init__(self, read: Callable[[list[str]], Awaitable[list[R]]], max_texts: int, in_flight: int) -> None:
        """`read` returns one result a text; a request of more than `max_texts` is a call of its own."""
        self._read = read
        self._max_texts = max_texts
        self._in_flight = in_flight
        self._waiting: deque[tuple[list[str], asyncio.Future[list[R]]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    async def __call__(self, texts: list[str]) -> list[R]:
        """One result a text; raises what `read` raised of these texts."""
        answer: asyncio.Future[list[R]] = asyncio.get_running_loop().create_future()
        self._waiting.append((texts, answer))
        self._start_calls()
        return await answer

    def _start_calls(self) -> None:
        while self._waiting and len(self._calls) < self._in_flight:
            batch = self._next_batch()
            if not batch:
                return
            call = asyncio.get_running_loop().create_task(self._call(batch))
            self._calls.add(call)
            call.add_done_callback(self._call_ended)

    def _call_ended(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._start_calls()

    def _next_batch(self) -> list[tuple[list[str], "asyncio.Future[list[R]]"]]:
        """The requests of the next call, oldest first, without those nobody waits for any more."""
        batch: list[tuple[list[str], asyncio.Future[list[R]]]] = []
        texts = 0
        while self._waiting:
            request = self._waiting[0]
            if request[1].done():
                self._waiting.popleft()
                continue
            if batch and texts + len(request[0]) > self._max_texts:
                break
            batch.append(self._waiting.popleft())
            texts += len(request[0])
        return batch

    async def _call(self, batch: list[tuple[list[str], "asyncio.Future[list[R]]"]]) -> None:
        try:
            results = await self._read([text for texts, _ in batch for text in texts])
        except Exception as error:
            waiting = [request for request in batch if not request[1].done()]
            if len(batch) > 1:
                # It may be one request's text that is refused; one after the other they would fail too late.
                await asyncio.gather(*(self._call([request]) for request in waiting))
            elif waiting:
                waiting[0][1].set_exception(error)
            return
        start = 0
        for texts, answer in batch:
            if not answer.done():
                answer.set_result(results[start : start + len(texts)])
            start += len(texts)
