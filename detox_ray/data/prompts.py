"""Prompts from files, the hub or the lab: read, filtered, cut to length, deduplicated and split by their text."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_ray.config import LAB_PREFIX, DataConfig
from detox_ray.errors import ConfigError, DataError
from detox_ray.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
SKIP_REASONS = ("empty text", "null score", "outside score window", "too short", "too long", "duplicate")


@dataclass(frozen=True)
class PromptSplit:
    """Prompts to train on and prompts kept for the evaluation; no text is in both. `skipped` counts by reason."""

    train: list[Prompt]
    heldout: list[Prompt]
    skipped: dict[str, int]


def load_prompts(config: DataConfig, tokenizer: "PreTrainedTokenizerBase", seed: int) -> PromptSplit:
    """The prompts that `config` describes, in the tokens of `tokenizer`.

    A prompt longer than `max_tokens` keeps its first `max_tokens` tokens (or is dropped); prompts are one when their
    texts agree but for case and white space. All choices go by a digest of seed and text, never by the order of the
    file: the `limit` prompts of lowest digest are used, and of those the first `heldout_prompts` are held out.
    Both lists are in that order.

    Raises:
        DataError: the source is missing, empty or malformed, lacks a column, or leaves too few prompts.
        ConfigError: the source names no part of the lab.
    """
    source = _lab_source(config.source)
    skipped = Counter(dict.fromkeys(SKIP_REASONS, 0))
    start = start_ids(tokenizer)
    prompts: dict[str, Prompt] = {}
    rows = 0
    for record in _records(source, config):
        rows += 1
        text = _text(record, config)
        reason = _unwanted(record, text, config)
        if reason is None:
            prompt = _prompt(record, text, config, tokenizer, start)
            reason = prompt if isinstance(prompt, str) else None
        if reason is None and isinstance(prompt, Prompt):
            key = " ".join(prompt.text.casefold().split())
            # Of several spellings the smallest stays, so that the order of the file does not matter.
            if key in prompts:
                reason = "duplicate"
                prompt = min(prompt, prompts[key], key=lambda p: p.text)
            prompts[key] = prompt
        if reason is not None:
            skipped[reason] += 1
    return _split(prompts, config, seed, rows, dict(skipped))
