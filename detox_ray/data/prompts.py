"""Prompts from files, the hub or the lab: read, filtered, cut to length, deduplicated and split by their text."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from detox_ray.config import DataConfig
from detox_ray.data.examples import read_examples
from detox_ray.data.learned import learned_digest
from detox_ray.data.sources import read_records
from detox_ray.data.templates import DialogueTemplate, frame_length, start_ids, stop_ids
from detox_ray.errors import DataError
from detox_ray.records import LEAD, REFERENCES, Prompt

Record = Mapping[str, Any]


class _Found(NamedTuple):
    """A prompt, what others share that are held out with it, and which texts it is the beginning of (see `learned`)."""

    prompt: Prompt
    group: str
    texts: frozenset[str]


@dataclass(frozen=True)
class PromptSplit:
    """Prompts to train on and prompts kept for the evaluation; no text is in both.

    `skipped` counts what was left out, by reason: "empty text", "null score", "outside score window", "too short",
    "too long", "duplicate". `learned`: the texts, not cut, that the prompts of `train` or their dialogues begin with.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    skipped: dict[str, int]
    learned: frozenset[str] = frozenset()


def load_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, learned: Set[str] = frozenset()
) -> PromptSplit:
    """The prompts that `config` describes, in the tokens of `tokenizer`.

    A prompt longer than `max_tokens` keeps its first `max_tokens` tokens (or is dropped). Two texts that agree but for
    case and white space are one prompt. What is used and what is held out goes by a digest of seed and text, never by
    the order of the file: the `limit` prompts of lowest digest are used, the first `heldout_prompts` of them held out
    that are not in `learned` (see `learned_by`).

    Raises:
        DataError: the source is missing, empty or malformed, lacks a column, or leaves too few prompts.
        ConfigError: the source names no part of the lab.
    """
    found, records, skipped = _unique_prompts(config, tokenizer, seed)
    new = [one for one in found if learned.isdisjoint(map(learned_digest, one.texts))] if learned else found
    if len(new) < config.heldout_prompts <= len(found):
        raise DataError(
            f"data.heldout_prompts = {config.heldout_prompts}: {len(found) - len(new)} of {len(found)} prompts are "
            f"among those that policy.adapter was trained on, {len(new)} are new; hold out fewer, or give other prompts"
        )
    heldout = new[: config.heldout_prompts]
    groups = {one.group for one in heldout}
    train = [one for one in found if one.group not in groups]
    if not train:
        limit = "" if config.limit is None else f", data.limit = {config.limit}"
        raise DataError(
            f"data.heldout_prompts = {config.heldout_prompts} leaves nothing to train on: {len(found)} prompts of "
            f"{records} records in {config.source} ({_listed_counts(skipped)}{limit}); lower it or give more prompts"
        )
    return PromptSplit(
        [one.prompt for one in train],
        [one.prompt for one in heldout],
        skipped,
        frozenset[str]().union(*(one.texts for one in train)),
    )


def load_all_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptSplit:
    """As `load_prompts`, with every prompt held out: for an evaluation that no training goes before."""
    found, _, skipped = _unique_prompts(config, tokenizer, seed)
    return PromptSplit([], [one.prompt for one in found], skipped)


def _unique_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[_Found], int, dict[str, int]]:
    """The prompts of all sources, the number of records, and what was left out; errors as `_prompts_of_source`.

    The prompts of each source are spread evenly, so that the first n hold of every source what all of them hold.
    """
    parts = [_prompts_of_source(source, tokenizer, seed) for source in config.sources]
    skipped: Counter[str] = Counter()
    placed: list[tuple[float, _Found]] = []
    for found, _, left_out in parts:
        skipped.update(left_out)
        placed += [((place + 0.5) / len(found), one) for place, one in enumerate(found)]
    unique: dict[str, _Found] = {}
    for _, one in sorted(placed, key=lambda item: item[0]):
        key = normalized(one.prompt.text)
        unique[key] = unique[key]._replace(texts=unique[key].texts | one.texts) if key in unique else one
    if repeated := len(placed) - len(unique):
        skipped["duplicate"] += repeated
    return list(unique.values()), sum(records for _, records, _ in parts), dict(skipped)


def _prompts_of_source(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[_Found], int, dict[str, int]]:
    """At most `limit` prompts in the order of their groups' digests, the number of records, and what was left out.

    Raises:
        DataError: the source is missing, empty or malformed, lacks a column, or nothing is left of it.
        ConfigError, ModelError: the template does not go with the tokenizer.
    """
    skipped: Counter[str] = Counter()
    if config.format == "text" and config.template == "none":
        found, records = _text_prompts(config, tokenizer, skipped)
    else:
        found, records = _templated_prompts(config, tokenizer, skipped)
    unique: dict[str, _Found] = {}
    for prompt, group, texts in found:
        key = normalized(prompt.text)
        if key in unique:
            skipped["duplicate"] += 1
            # Of several spellings the smallest stays, whatever order they come in.
            prompt = min(prompt, unique[key].prompt, key=lambda p: (p.text, p.token_ids, repr(p.meta)))
            group = min(group, unique[key].group)
            texts |= unique[key].texts
        unique[key] = _Found(prompt, group, texts)
    if not unique:
        raise DataError(
            f"data.source = {config.source!r}: none of {records} records is left ({_listed_counts(skipped)}); "
            "widen the data filters"
        )
    order = sorted(unique, key=lambda key: (group_digest(seed, unique[key].group), group_digest(seed, key)))
    return [unique[key] for key in order[: config.limit]], records, dict(skipped)


def _text_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, skipped: Counter[str]
) -> tuple[list[_Found], int]:
    """The prompts of a source with one text per record, each a group of its own, and the number of records."""
    records = read_records(config)
    kept: list[tuple[str, dict[str, Any]]] = []
    for record in records:
        text, meta = _text_and_meta(record, config)
        if reason := _unwanted(text, meta, config):
            skipped[reason] += 1
        else:
            kept.append((text, meta))
    found = []
    start, stop = start_ids(tokenizer), stop_ids(tokenizer)
    encoded = (
        tokenizer([text for text, _ in kept], add_special_tokens=False, verbose=False)["input_ids"] if kept else []
    )
    for (text, meta), ids in zip(kept, encoded, strict=True):
        whole = frozenset({normalized(text)})
        if len(ids) < config.min_tokens:
            skipped["too short"] += 1
            continue
        if len(ids) > config.max_tokens:
            if config.too_long == "drop":
                skipped["too long"] += 1
                continue
            ids = ids[: config.max_tokens]
            text = str(tokenizer.decode(ids))
        found.append(_Found(_prompt(text, (*start, *ids, *stop), meta), normalized(text), whole))
    return found, len(records)


def _templated_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, skipped: Counter[str]
) -> tuple[list[_Found], int]:
    """The prompts that a template writes of texts or dialogues, each of which is a group, and the number of records."""
    template = DialogueTemplate(tokenizer, config.template, config.turn_separator)
    frame = frame_length(tokenizer)
    found = []
    spoken = _spoken(config, skipped)
    for turns, meta in spoken:
        if reason := _unwanted(turns[-1], meta, config):
            skipped[reason] += 1
            continue
        fitting = template.fitting_prompt(turns, config.max_tokens + frame, trim=config.too_long == "trim")
        if fitting is None:
            skipped["too long"] += 1
        elif len(fitting.token_ids) < config.min_tokens + frame:
            skipped["too short"] += 1
        else:
            first = normalized(turns[0])
            found.append(_Found(_prompt(fitting.text, fitting.token_ids, meta), first, frozenset({first})))
    return found, len(spoken)


def _spoken(config: DataConfig, skipped: Counter[str]) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """(turns, the person's last; other columns) of every prompt of the source."""
    if config.format == "text":
        return [((text,), meta) for text, meta in (_text_and_meta(r, config) for r in read_records(config))]
    file = read_examples(config.source, config.format)
    skipped.update(file.left_out)
    # Several answers to one prompt make several examples and one prompt.
    spoken: dict[tuple[str, ...], dict[str, Any]] = {}
    for example in file.examples:
        meta = spoken.setdefault(example.turns, {**example.meta, REFERENCES: []})
        meta[REFERENCES].append(example.response)
        if config.format == "dialogsum":
            meta[LEAD] = example.turns[0].partition("\n")[0]
    return list(spoken.items())


def _prompt(text: str, token_ids: tuple[int, ...], meta: dict[str, Any]) -> Prompt:
    return Prompt(hashlib.sha256(text.encode()).hexdigest()[:16], text, token_ids, meta)


def group_digest(seed: int, group: str) -> bytes:
    """What decides which groups of prompts are held out, and which are used when not all are."""
    return hashlib.sha256(f"{seed}\n{group}".encode()).digest()


def normalized(text: str) -> str:
    """The text in one case and with single spaces; two prompts that agree in it are one."""
    return " ".join(text.casefold().split())


def _text_and_meta(record: Record, config: DataConfig) -> tuple[str, dict[str, Any]]:
    """A record's text, and its other plain columns with RealToxicityPrompts' nested scores beside them.

    Raises:
        DataError: the text is not text.
    """
    value = record[config.text_column]
    ours = (config.text_column, REFERENCES, LEAD)  # the last two are what `read_examples` finds, not a column
    meta = {k: v for k, v in record.items() if k not in ours and not isinstance(v, Mapping | list)}
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
