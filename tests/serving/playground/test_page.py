"""What the page asks its classifiers while it loads."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from detox_ray.serving.playground.cards import Scorer
from detox_ray.serving.playground.page import PROMPTS_A_CALL, Page
from detox_ray.serving.playground.prompts import OfferedPrompt
from detox_ray.serving.playground.setup import PageSetup

# Nothing is started, but Ray is imported.
pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("prompts", [0, PROMPTS_A_CALL, 100])
def test_the_judge_reads_the_prompts_a_few_at_a_time(prompts: int) -> None:
    calls: list[list[str]] = []

    async def toxicity(texts: list[str]) -> dict[str, np.ndarray]:
        calls.append(texts)
        return {"judge": np.array([0.5 if text == "hello" else int(text) / 1000 for text in texts])}

    offered = [OfferedPrompt("known", 0.5), *(OfferedPrompt(f"{i}", None) for i in range(prompts))]
    setup = PageSetup("", "", None, (), (Scorer("judge", in_reward=False),), tuple(offered), 1.0, 1.0, 8)
    scorers: Any = SimpleNamespace(toxicity=SimpleNamespace(remote=toxicity))
    page = Page(setup, scorers, scorers)
    asyncio.run(page._wait_for_scorers())
    read = [text for call in calls for text in call]
    assert read == ([f"{i}" for i in range(prompts)] or ["hello"])
    assert max(map(len, calls)) <= PROMPTS_A_CALL
    assert {p.text: p.toxicity for p in page._shelf.prompts} == {"known": 0.5} | {
        f"{i}": i / 1000 for i in range(prompts)
    }
    assert "the classifiers" not in page._loading
