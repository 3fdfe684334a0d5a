"""Prompts from files, the hub or the lab: read, filtered, cut to length, deduplicated and split by their text."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from detox_ray.config import DataConfig
from detox_ray.data.sources import read_records
from detox_ray.errors import DataError
from detox_ray.records import Prompt

Record = Mapping[str, Any]


@dataclass(frozen=True)
class PromptSplit:
    """Prompts to train on and prompts kept for the evaluation; no text is in both.

    `skipped` counts what was left out, by reason: "empty text", "null score", "outside score window", "too short",
    "too long", "duplicate".
    """

    train: list[Prompt]
    heldout: list[Prompt]
    skipped: dict[str, int]


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptSplit:
    """The prompts that `config` describes, in the tokens of `tokenizer`.

    A prompt longer than `max_tokens` keeps its first `max_tokens` tokens (or is dropped). Two texts that agree but for
    case and white space are one prompt. What is used and what is held out goes by a digest of seed and text, never by
    the order of the file: the `limit` prompts of lowest digest are used, the first `heldout_prompts` of them held out.

    Raises:
        DataError: the source is missing, empty or malformed, lacks a column, or leaves too few prompts.
        ConfigError: the source names no part of the lab.
    """
    prompts, records, skipped = _unique_prompts(config, tokenizer, seed)
    if len(prompts) <= config.heldout_prompts:
        limit = "" if config.limit is None else f", data.limit = {config.limit}"
        raise DataError(
            f"data.heldout_prompts = {config.heldout_prompts} leaves nothing to train on: {len(prompts)} prompts of "
            f"{records} records in {config.source} ({_listed_counts(skipped)}{limit}); lower it or give more prompts"
        )
    return PromptSplit(prompts[config.heldout_prompts :], prompts[: config.heldout_prompts], skipped)


def load_all_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptSplit:
    """As `load_prompts`, with every prompt held out: for an evaluation that no training goes before."""
    prompts, _, skipped = _unique_prompts(config, tokenizer, seed)
    return PromptSplit([], prompts, skipped)


def _unique_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[Prompt], int, dict[str, int]]:
    """At most `limit` prompts in the order of their digests, the number of records, and what was left out.

    Raises:
        DataError: the source is missing, empty or malformed, lacks a column, or nothing is left of it.
    """
    records = read_records(config)
    skipped: Counter[str] = Counter()
    kept: list[tuple[str, dict[str, Any]]] = []
    for record in records:
        text, meta = _text_and_meta(record, config)
        if reason := _unwanted(text, meta, config):
            skipped[reason] += 1
        else:
            kept.append((text, meta))

    unique: dict[str, Prompt] = {}
    start = start_ids(tokenizer)
    encoded = (
        tokenizer([text for text, _ in kept], add_special_tokens=False, verbose=False)["input_ids"] if kept else []
    )
    for (text, meta), ids in zip(kept, encoded, strict=True):
        if len(ids) < config.min_tokens:
            skipped["too short"] += 1
            continue
        if len(ids) > config.max_tokens:
            if config.too_long == "drop":
                skipped["too long"] += 1
                continue
            ids = ids[: config.max_tokens]
            text = str(tokenizer.decode(ids))
        prompt = Prompt(hashlib.sha256(text.encode()).hexdigest()[:16], text, (*start, *ids), meta)
        key = normalized(text)
        if key in unique:
            skipped["duplicate"] += 1
            # Of several spellings the smallest stays, whatever order they come in.
            prompt = min(prompt, unique[key], key=lambda p: (p.text, p.token_ids, repr(p.meta)))
        unique[key] = prompt
    if not unique:
        raise DataError(
            f"data.source = {config.source!r}: none of {len(records)} records is left ({_listed_counts(skipped)}); "
            "widen the data filters"
        )
    order = sorted(unique, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    return [unique[key] for key in order[: config.limit]], len(records), dict(skipped)


def start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What begins a document: the bos token, or nothing.

    It is prepended when the tokenizer itself would prepend it, and when it is the end token as well: models such as
    GPT-2 and Pythia saw it between documents, though their tokenizers do not add it.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return ()
    if bos == tokenizer.eos_token_id or tokenizer("a")["input_ids"][:1] == [bos]:
        return (bos,)
    return ()


def normalized(text: str) -> str:
    """The text in one case and with single spaces; two prompts that agree in it are one."""
    return " ".join(text.casefold().split())


def _text_and_meta(record: Record, config: DataConfig) -> tuple[str, dict[str, Any]]:
    """A record's text, and its other plain columns with RealToxicityPrompts' nested scores beside them.

    Raises:
        DataError: the text is not text.
    """
    value = record[config.text_column]
    meta = {k: v for k, v in record.items() if k != config.text_column and not isinstance(v, Mapping | list)}
    if isinstance(value, Mapping) and "text" in value:
        meta |= {k: v for k, v in value.items() if k != "text"}
        value = value["text"]
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise DataError(
            f"data.text_column = {config.text_column!r}: {str(value)[:40]!r} in {config.source} is "
            f"{type(value).__name__}, not text; name a column with text"
        )
    return value, meta


def _unwanted(text: str, meta: Record, config: DataConfig) -> str | None:
    """Why a prompt is left out before it is tokenised, or None.

    Raises:
        DataError: a score window is set and the attribute is absent or not a number.
    """
    if not text.strip():
        return "empty text"
    if config.min_score is None and config.max_score is None:
        return None
    if config.attribute not in meta:
        raise DataError(
            f"data.attribute = {config.attribute!r} is not in {config.source}; it has {_listed(meta)}: "
            "name one of them, or leave data.min_score and data.max_score out"
        )
    value = meta[config.attribute]
    try:
        score = math.nan if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        raise DataError(
            f"data.attribute = {config.attribute!r}: {str(value)[:40]!r} in {config.source} is not a number; "
            "name a column of numbers"
        ) from None
    if math.isnan(score):
        return "null score"
    low = -math.inf if config.min_score is None else config.min_score
    high = math.inf if config.max_score is None else config.max_score
    return None if low <= score <= high else "outside score window"


def _listed_counts(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none left out"


def _listed(columns: Record) -> str:
    return ", ".join(map(str, columns)) or "no other columns"
