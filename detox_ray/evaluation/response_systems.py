"""Systems of the meter that are files: what somebody else's model answered, with the scores the file came with."""

import hashlib
from dataclasses import dataclass

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from detox_ray.data.response_file import ONLY_SYSTEM, ResponseTexts, read_responses
from detox_ray.evaluation.responses import SystemResponses, word_ids
from detox_ray.meter_config import SystemConfig
from detox_ray.records import Prompt, Rollout


@dataclass(frozen=True)
class PublishedSystem:
    """A system's responses and the file's own scores of them: scorer -> [P, S] in [0, 1]."""

    responses: SystemResponses
    scores: dict[str, np.ndarray]


def read_systems(
    system: SystemConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[PublishedSystem], dict[str, int]]:
    """The systems whose responses a file holds, and what was left out or is worth a word, by reason.

    Responses are counted in the tokens of `tokenizer`, without one in words.

    Raises:
        DataError: as `read_responses`.
    """
    assert system.responses is not None
    file = read_responses(system.responses, system.columns)
    systems = [
        PublishedSystem(_responses(system.name if name == ONLY_SYSTEM else name, texts, tokenizer), texts.scores)
        for name, texts in file.systems.items()
    ]
    return systems, file.left_out | file.noted


def _responses(name: str, texts: ResponseTexts, tokenizer: PreTrainedTokenizerBase | None) -> SystemResponses:
    flat = [text for samples in texts.responses for text in samples]
    ids = iter(_token_ids(flat, tokenizer))
    prompts, rollouts = [], []
    for index, (text, samples) in enumerate(zip(texts.prompts, texts.responses, strict=True)):
        meta = {} if texts.prompt_scores is None else {"toxicity": float(texts.prompt_scores[index])}
        prompt = Prompt(hashlib.sha256(text.encode()).hexdigest()[:16], text, (), meta)
        prompts.append(prompt)
        rollouts.append([_rollout(prompt, response, next(ids)) for response in samples])
    return SystemResponses(name, prompts, rollouts)


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    if tokenizer is not None:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [word_ids(text) for text in texts]


def _rollout(prompt: Prompt, response: str, ids: list[int]) -> Rollout:
    return Rollout(
        prompt_id=prompt.id,
        prompt_text=prompt.text,
        prompt_ids=np.zeros(0, dtype=np.int64),
        response_ids=np.array(ids, dtype=np.int64),
        logprobs=np.full(len(ids), np.nan, dtype=np.float32),
        text=response,
        finish_reason="",
        adapter_version=-1,
    )
