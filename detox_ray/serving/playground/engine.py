"""The engine behind the page: one base in memory with every adapter of the run, which answer together."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from detox_ray.config import PolicyConfig
from detox_ray.data.templates import start_ids, stop_ids
from detox_ray.serving.playground.answers import Piece
from detox_ray.serving.playground.request import AnswerRequest

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class EngineSetup:
    """What the engine loads: the run's base with `adapters`, on a GPU or on `threads` threads of the CPU."""

    policy: PolicyConfig
    adapters: tuple[Path, ...]
    positions: int  # tokens that the model can read and write together
    threads: int
    gpu: bool


class EngineDeployment:
    """Answers requests one after the other; a request waits for those before it."""

    def __init__(self, setup: EngineSetup) -> None:
        import torch
        import transformers

        from detox_ray.policy.load import end_token_ids, load_tokenizer
        from detox_ray.policy.systems import Systems

        torch.set_num_threads(setup.threads)
        transformers.utils.logging.disable_progress_bar()
        self._positions = setup.positions
        self._tokenizer = load_tokenizer(setup.policy)
        self._end_ids = end_token_ids(setup.policy, self._tokenizer)
        self._systems = Systems(setup.policy, setup.adapters, torch.device("cuda" if setup.gpu else "cpu"))
        self._names = 1 + len(setup.adapters)
        self._turn = asyncio.Lock()
        # One thread, so that what a cancelled request still computes is over before the next one begins.
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def refusal(self, request: AnswerRequest) -> str | None:
        """Why a request cannot be answered, in one line; None when it can. Answers once the engine is loaded."""
        tokens, most = len(self._prompt_ids(request.prompt)), self._positions - request.max_new_tokens
        if tokens <= most:
            return None
        return (
            f"the prompt has {tokens} tokens and may have {most} where the answer has up to "
            f"{request.max_new_tokens}; shorten one of them"
        )

    async def answer(self, request: AnswerRequest) -> AsyncIterator[list[Piece | None]]:
        """The next piece of every system's answer, step by step; None once it has ended."""
        texts = [PieceTexts(self._tokenizer) for _ in range(self._names)]
        steps = self._systems.answer(
            self._prompt_ids(request.prompt),
            self._end_ids,
            request.max_new_tokens,
            request.temperature,
            request.top_p,
            request.seed,
        )
        loop = asyncio.get_running_loop()
        async with self._turn:
            while (step := await loop.run_in_executor(self._thread, next, steps, None)) is not None:
                yield [
                    None
                    if token is None
                    else Piece(text.add(token.token_id), token.logprob, token.shift, token.token_id in self._end_ids)
                    for text, token in zip(texts, step, strict=True)
                ]

    def _prompt_ids(self, prompt: str) -> list[int]:
        """As in training: the text, with the start and end tokens that the model knows around prompts."""
        ids = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return [*start_ids(self._tokenizer), *ids, *stop_ids(self._tokenizer)]


class PieceTexts:
    """The text of an answer, token by token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token_id: int) -> str:
        """What the token adds; nothing while a character that spans tokens is incomplete."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        settled = text.rstrip(UNFINISHED)
        added, self._shown = settled[len(self._shown) :], max(self._shown, settled, key=len)
        return added
