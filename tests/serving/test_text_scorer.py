"""Readiness and answers of old replicas, with an ensemble that answers when and what it is told to."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from detox_ray.records import Readings
from detox_ray.serving import text_scorer
from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.api_errors import ApiError
from detox_ray.serving.api_metrics import ApiMetrics
from detox_ray.serving.text_scorer import PROBE, TextScorer

# Nothing is started, but Ray is imported.
pytestmark = pytest.mark.e2e

Answer = dict[str, list[Readings]]


class Ensemble:
    """Notes every call, and answers when it may."""

    def __init__(self, answer: Callable[[int], Answer]) -> None:
        """`answer` is told how many calls there were before."""
        self.calls: list[list[str]] = []
        self.may_answer = asyncio.Event()
        self._answer = answer
        self.read = SimpleNamespace(remote=self._read)

    async def _read(self, texts: list[str]) -> Answer:
        self.calls.append(texts)
        answer = self._answer(len(self.calls) - 1)
        await self.may_answer.wait()
        return answer


def readings(*labels: str) -> Readings:
    """Of one text."""
    half = np.array([0.5])
    return Readings(half, half, dict.fromkeys(labels, half), np.ones(1, int))


def scorer(ensemble: Any, release: str = "", **limits: float) -> TextScorer:
    classifier = {"name": "words", "kind": "linear", "model": "a:b", "output": "probability", "calibration": "none"}
    tree = {
        "reward": {"classifiers": [classifier]},
        "attributes": {"INSULT": {"classifier": "words", "label": "insult"}},
        "limits": limits,
    }
    return TextScorer(ensemble, ApiConfig.model_validate(tree), ApiMetrics(), release)


def test_those_who_ask_at_once_share_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_scorer, "PROBE_TIMEOUT_S", 0.05)

    async def scenario() -> None:
        ensemble = Ensemble(lambda _: {"words": [readings("insult")]})
        asked = scorer(ensemble)
        assert await asyncio.gather(*(asked.is_ready() for _ in range(5))) == [False] * 5
        # The probe is still under way.
        assert not await asked.is_ready()
        assert ensemble.calls == [[PROBE]]
        ensemble.may_answer.set()
        assert await asked.is_ready()
        assert ensemble.calls == [[PROBE]]

    asyncio.run(scenario())


def test_a_probe_that_is_lost_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_scorer, "PROBE_TIMEOUT_S", 0.05)

    async def scenario() -> None:
        ensemble = Ensemble(lambda _: {"words": [readings("insult")]})
        asked = scorer(ensemble, timeout_s=0.1)
        for _ in range(4):
            assert not await asked.is_ready()
        assert len(ensemble.calls) == 2

    asyncio.run(scenario())


def test_while_texts_are_under_way_an_older_answer_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_scorer, "PROBE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(text_scorer, "READY_FOR_S", 0.05)

    async def scenario() -> None:
        ensemble = Ensemble(lambda _: {"words": [readings("insult")]})
        asked = scorer(ensemble, timeout_s=1)
        ensemble.may_answer.set()
        await asked.read(["a"])
        ensemble.may_answer.clear()
        await asyncio.sleep(0.1)
        assert not await asked.is_ready()
        under_way = asyncio.create_task(asked.read(["b"]))
        await asyncio.sleep(0.1)
        assert await asked.is_ready()
        with pytest.raises(ApiError, match="did not answer within 1 s"):
            await under_way
        assert not await asked.is_ready()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "old", [{}, {"words": [readings("rude")]}, {"words": [readings("insult"), readings("rude")]}], ids=len
)
def test_an_answer_of_an_old_replica_is_asked_for_again(old: Answer) -> None:
    async def scenario() -> None:
        ensemble = Ensemble(lambda before: old if before < 2 else {"words": [readings("insult")]})
        ensemble.may_answer.set()
        [reading] = await scorer(ensemble).read(["a"])
        assert reading.labels == {"words": {"insult": 0.5}}
        assert len(ensemble.calls) == 3

    asyncio.run(scenario())


def test_answers_of_old_replicas_alone_are_unavailable_and_not_kept() -> None:
    async def scenario() -> None:
        ensemble = Ensemble(lambda before: {"words": [readings("rude" if before < 2 else "insult")]})
        ensemble.may_answer.set()
        asked = scorer(ensemble, timeout_s=0.7)
        with pytest.raises(ApiError, match="label 'insult' of classifier 'words' is not served") as error:
            await asked.read(["a"])
        assert (error.value.status, error.value.code, error.value.retry_after_s) == (503, "classifier_unavailable", 1)
        [reading] = await asked.read(["a"])
        assert reading.labels == {"words": {"insult": 0.5}}

    asyncio.run(scenario())


def test_answers_of_another_release_are_returned_and_not_kept() -> None:
    old, new = (replace(readings("insult"), release=release) for release in ("old", "new"))

    async def scenario() -> None:
        # While replicas are replaced, a list may be shared by an old one and a new one.
        answers = [[old], [new, old], [new], [new]]
        ensemble = Ensemble(lambda before: {"words": answers[before]})
        ensemble.may_answer.set()
        asked = scorer(ensemble, release="new")
        for calls in (1, 2, 3, 3):
            [reading] = await asked.read(["a"])
            assert reading.toxicity == {"words": 0.5}
            assert len(ensemble.calls) == calls

    asyncio.run(scenario())
