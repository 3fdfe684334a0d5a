import asyncio

import pytest

from detox_ray.serving.batcher import TextBatcher

pytestmark = pytest.mark.unit


class Reader:
    """Notes every call, and answers when it is told to."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.may_answer = asyncio.Event()

    async def __call__(self, texts: list[str]) -> list[str]:
        self.calls.append(texts)
        await self.may_answer.wait()
        if "bad" in texts:
            raise ConnectionError("down")
        return [text.upper() for text in texts]


def test_requests_that_wait_make_one_call_and_get_their_own_answers() -> None:
    async def scenario() -> None:
        reader = Reader()
        batcher = TextBatcher(reader, max_texts=4, in_flight=1)
        requests = [asyncio.create_task(batcher(texts)) for texts in (["a"], ["b", "c"], ["d"], ["e", "f"])]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert reader.calls == [["a"]]
        reader.may_answer.set()
        assert await asyncio.gather(*requests) == [["A"], ["B", "C"], ["D"], ["E", "F"]]
        # Oldest first; the fourth request did not fit.
        assert reader.calls == [["a"], ["b", "c", "d"], ["e", "f"]]

    asyncio.run(scenario())


def test_a_long_list_is_a_call_of_its_own() -> None:
    async def scenario() -> None:
        reader = Reader()
        reader.may_answer.set()
        batcher = TextBatcher(reader, max_texts=2, in_flight=1)
        answers = await asyncio.gather(batcher(["a"]), batcher(["b"] * 5), batcher(["c"]))
        assert answers == [["A"], ["B"] * 5, ["C"]]
        assert reader.calls == [["a"], ["b"] * 5, ["c"]]

    asyncio.run(scenario())


def test_no_more_calls_run_than_allowed() -> None:
    async def scenario() -> None:
        reader = Reader()
        batcher = TextBatcher(reader, max_texts=1, in_flight=2)
        requests = [asyncio.create_task(batcher([text])) for text in "abcd"]
        await asyncio.sleep(0.01)
        assert reader.calls == [["a"], ["b"]]
        reader.may_answer.set()
        await asyncio.gather(*requests)
        assert reader.calls == [["a"], ["b"], ["c"], ["d"]]

    asyncio.run(scenario())


def test_an_error_reaches_its_batch_and_nobody_else() -> None:
    async def scenario() -> None:
        reader = Reader()
        reader.may_answer.set()
        batcher = TextBatcher(reader, max_texts=1, in_flight=1)
        good, bad, later = await asyncio.gather(
            batcher(["good"]), batcher(["bad"]), batcher(["later"]), return_exceptions=True
        )
        assert (good, later) == (["GOOD"], ["LATER"])
        assert isinstance(bad, ConnectionError)

    asyncio.run(scenario())


def test_an_error_of_one_request_is_not_that_of_its_batch() -> None:
    async def scenario() -> None:
        reader = Reader()
        batcher = TextBatcher(reader, max_texts=8, in_flight=1)
        requests = [asyncio.create_task(batcher(texts)) for texts in (["a"], ["b"], ["bad", "c"], ["d"])]
        await asyncio.sleep(0.01)
        reader.may_answer.set()
        found = await asyncio.gather(*requests, return_exceptions=True)
        assert (found[0], found[1], found[3]) == (["A"], ["B"], ["D"])
        assert isinstance(found[2], ConnectionError)
        assert reader.calls == [["a"], ["b", "bad", "c", "d"], ["b"], ["bad", "c"], ["d"]]

    asyncio.run(scenario())


def test_after_an_error_nobody_is_read_who_went_meanwhile() -> None:
    async def scenario() -> None:
        reader = Reader()
        batcher = TextBatcher(reader, max_texts=8, in_flight=1)
        first = asyncio.create_task(batcher(["a"]))
        await asyncio.sleep(0.01)
        gone, bad, good = (asyncio.create_task(batcher([text])) for text in ("gone", "bad", "good"))
        await asyncio.sleep(0.01)
        reader.may_answer.set()
        await first
        reader.may_answer.clear()
        await asyncio.sleep(0.01)
        gone.cancel()
        reader.may_answer.set()
        await asyncio.gather(bad, good, return_exceptions=True)
        assert reader.calls[2:] == [["bad"], ["good"]]

    asyncio.run(scenario())


def test_a_request_nobody_waits_for_is_not_read() -> None:
    async def scenario() -> None:
        reader = Reader()
        batcher = TextBatcher(reader, max_texts=1, in_flight=1)
        first, gone, last = (asyncio.create_task(batcher([text])) for text in ("first", "gone", "last"))
        await asyncio.sleep(0.01)
        gone.cancel()
        reader.may_answer.set()
        await asyncio.gather(first, last)
        assert reader.calls == [["first"], ["last"]]

    asyncio.run(scenario())
