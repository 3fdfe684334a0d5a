"""The examples of a fine-tuning in tokens: read, written by the template, fitted to length, split in train and dev."""

import json
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from detox_ray.data.examples import Example, ExampleFile, read_examples
from detox_ray.data.learned import learned_digest
from detox_ray.data.prompts import group_digest, normalized
from detox_ray.data.templates import DialogueTemplate, start_ids, stop_ids
from detox_ray.errors import DataError
from detox_ray.records import TokenizedExample
from detox_ray.sft_config import ExampleConfig


@dataclass(frozen=True)
class ExampleSplit:
    """Examples to learn from and examples for the dev loss; no dialogue is in both.

    `format` and `template` say in words how the source was read and written; `left_out` counts by reason what is in
    neither, `noted` what is but is worth a word. `learned`: the turns that the dialogues of `train` begin with.
    """

    train: list[TokenizedExample]
    dev: list[TokenizedExample]
    format: str
    template: str
    left_out: dict[str, int]
    noted: dict[str, int]
    learned: frozenset[str]


def load_examples(
    config: ExampleConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    seed: int,
    learned: Set[str] = frozenset(),
) -> ExampleSplit:
    """The examples that `config` describes, in the tokens of `tokenizer`, their responses ended by one of `end_ids`.

    Which dialogues are for the dev loss goes by a digest of seed and first turn, as for the held-out prompts of
    `load_prompts`. What begins like a dev example is not trained on, also when the dev examples are in a file of their
    own. No dev example begins like what is in `learned` (see `learned_by`), unless it is of a file of its own.

    Raises:
        DataError: a file is missing, empty or malformed, lacks a column, or leaves nothing to train on or to evaluate.
        ConfigError, ModelError: the template does not go with the tokenizer.
    """
    writer = _Writer(config, tokenizer, end_ids)
    source = _read(config.source, config)
    groups = writer.by_group(source, seed)
    if config.dev_source is None:
        new = {group: examples for group, examples in groups.items() if learned_digest(group) not in learned}
        writer.noted["dialogue that policy.adapter has learned from, so not for the dev loss"] = len(groups) - len(new)
        dev = _first_groups(new, writer.prompts, config.dev_examples)
    else:
        dev = writer.by_group(_read(config.dev_source, config), seed)
        writer.left_out["beginning like a dev example"] += sum(
            len(groups[group]) for group in groups.keys() & dev.keys()
        )
    of_train = [(group, e) for group, examples in groups.items() if group not in dev for e in examples][: config.limit]
    train = [example for _, example in of_train]
    if not train or not dev:
        why = [*writer.left_out.items(), *writer.noted.items()]
        counts = ", ".join(f"{count} {reason}" for reason, count in why if count) or "none left out"
        raise DataError(
            f"data.source={config.source}: {len(train)} examples to train on and {sum(map(len, dev.values()))} for the "
            f"dev loss are left of {len(source.examples)} ({counts}); lower data.dev_examples={config.dev_examples} or "
            f"raise data.max_tokens={config.max_tokens}"
        )
    of_dev = [example for examples in dev.values() for example in examples][: config.dev_examples]
    responses = {example.response_ids.tobytes() for example in train}
    writer.noted["dev example whose very response is also trained on, in another dialogue"] = sum(
        example.response_ids.tobytes() in responses for example in of_dev
    )
    return ExampleSplit(
        train,
        of_dev,
        source.format,
        str(writer.template),
        {reason: count for reason, count in writer.left_out.items() if count},
        {remark: count for remark, count in writer.noted.items() if count},
        frozenset(group for group, _ in of_train),
    )


def dev_prompts(examples: ExampleSplit, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompts of the dev examples, one JSON object per line, each once: what an evaluation of the run asks."""
    start, stop = start_ids(tokenizer), stop_ids(tokenizer)
    texts: dict[str, None] = {}
    for example in examples.dev:
        ids = example.prompt_ids.tolist()
        # What an evaluation writes around a prompt by itself; some chat templates do without the start.
        first = len(start) if tuple(ids[: len(start)]) == start else 0
        texts[str(tokenizer.decode(ids[first : len(ids) - len(stop)]))] = None
    return "".join(json.dumps({"prompt": text}) + "\n" for text in texts)


def _read(source: str, config: ExampleConfig) -> ExampleFile:
    return read_examples(source, config.format, config.prompt_column, config.response_column)


def _first_groups(
    groups: dict[str, list[TokenizedExample]], prompts: dict[str, set[str]], wanted: int
) -> dict[str, list[TokenizedExample]]:
    """The first groups, whole, that hold so many different prompts together, which is how `load_prompts` counts.

    `prompts`: group -> the different prompts of its examples.
    """
    chosen: dict[str, list[TokenizedExample]] = {}
    held = 0
    for group, members in groups.items():
        if held >= wanted:
            break
        chosen[group] = members
        held += len(prompts[group])
    return chosen


class _Writer:
    """Writes examples in tokens, and counts those that do not fit."""

    def __init__(self, config: ExampleConfig, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        self.template = DialogueTemplate(tokenizer, config.template, config.turn_separator)
        self.left_out: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.prompts: dict[str, set[str]] = {}  # group -> the different prompts of the examples that fit
        self._config = config
        self._end_ids = end_ids

    def by_group(self, file: ExampleFile, seed: int) -> dict[str, list[TokenizedExample]]:
        """The examples that fit, by the turn their dialogues begin with, in the order of the groups' digests."""
        self.left_out.update(file.left_out)
        groups: dict[str, list[TokenizedExample]] = {}
        for example in file.examples:
            if (tokenized := self._fitted(example)) is not None:
                group = normalized(example.turns[0])
                groups.setdefault(group, []).append(tokenized)
                self.prompts.setdefault(group, set()).add(normalized(" ".join(example.turns)))
        return {group: groups[group] for group in sorted(groups, key=lambda group: group_digest(seed, group))}

    def _fitted(self, example: Example) -> TokenizedExample | None:
        """The example in at most `max_tokens` tokens, if need be without the earliest turns; None where that fails."""
        response_ids = self.template.response_ids(example.turns, example.response, self._end_ids)
        room = self._config.max_tokens - len(response_ids)
        if room < 1:
            self.left_out["response longer than data.max_tokens"] += 1
            return None
        prompt = self.template.fitting_prompt(example.turns, room, trim=self._config.too_long == "trim")
        if prompt is None:
            self.left_out["longer than data.max_tokens"] += 1
            return None
        if prompt != self.template.prompt(example.turns):
            self.noted["without the earliest turns, to fit data.max_tokens"] += 1
        return TokenizedExample(np.array(prompt.token_ids, dtype=np.int64), np.array(response_ids, dtype=np.int64))
