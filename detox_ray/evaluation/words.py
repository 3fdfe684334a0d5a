"""Which words became more or less likely: log-probability shifts of tokens, joined to words."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

WORD = re.compile(r"\w+(?:['\N{RIGHT SINGLE QUOTATION MARK}-]\w+)*")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class WordShift:
    """A word with the mean change of its log-probability in nats, over its `count` occurrences."""

    word: str
    mean_shift: float
    count: int


def token_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined they are the decoded sequence.

    A token that ends inside a character (byte-level vocabularies) adds nothing, and the one that completes it adds the
    character.
    """
    pieces: list[str] = []
    shown = 0
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        settled = text if end == len(token_ids) else text.rstrip(_UNFINISHED)
        pieces.append(settled[shown:])
        shown = max(shown, len(settled))
    return pieces


def word_shifts(pieces: Sequence[str], shifts: Sequence[float] | np.ndarray) -> list[tuple[str, float]]:
    """The words of one response, in lower case, each with the sum of its tokens' shifts.

    Log-probabilities of the tokens of a word add up to that of the word. A token that touches two words counts for the
    first; tokens of punctuation alone count for none. `pieces`, `shifts`: [R].
    """
    ends = list(accumulate(len(piece) for piece in pieces))
    starts = [0, *ends[:-1]]
    found = []
    token = 0
    for match in WORD.finditer("".join(pieces)):
        parts = []
        while token < len(pieces) and starts[token] < match.end():
            # A token without text of its own stands where the character begins that it is a part of.
            if ends[token] > match.start() or starts[token] == match.start():
                parts.append(float(shifts[token]))
            token += 1
        if parts:
            found.append((match.group().casefold(), sum(parts)))
    return found


def mean_by_word(occurrences: Iterable[tuple[str, float]], min_count: int) -> list[WordShift]:
    """Every word that occurs at least `min_count` times, the one that fell most first."""
    by_word: dict[str, list[float]] = {}
    for word, shift in occurrences:
        by_word.setdefault(word, []).append(shift)
    means = [WordShift(w, float(np.mean(s)), len(s)) for w, s in by_word.items() if len(s) >= min_count]
    return sorted(means, key=lambda shift: (shift.mean_shift, shift.word))
