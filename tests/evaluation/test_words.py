import numpy as np
import pytest

from detox_ray.data.lab_models import train_tokenizer
from detox_ray.evaluation.words import WordShift, mean_by_word, token_pieces, word_shifts

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Byte-level, too small to know a smiley or an accent as one token."""
    return train_tokenizer(["you fool, what a lovely day"] * 4, vocab_size=280)


def test_pieces_join_to_the_text_also_where_a_character_takes_several_tokens(byte_tokenizer):
    text = " what a café ☺ day"
    ids = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_pieces(byte_tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    # The smiley is three bytes, so two tokens say nothing yet.
    smiley = next(i for i, piece in enumerate(pieces) if "☺" in piece)
    assert pieces[smiley - 1] == ""
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_pieces_of_a_response_that_ends_within_a_character(byte_tokenizer):
    ids = byte_tokenizer("day ☺", add_special_tokens=False)["input_ids"][:-1]
    pieces = token_pieces(byte_tokenizer, ids)
    assert "".join(pieces) == byte_tokenizer.decode(ids)
    assert token_pieces(byte_tokenizer, []) == []


def test_tokens_are_joined_to_words_by_hand():
    pieces = [" You", " fo", "ol", "!", " don", "'t", " (", "we", ")"]
    shifts = [-1.0, -2.0, -0.5, 9.0, 1.0, 2.0, 7.0, 0.25, 8.0]
    assert word_shifts(pieces, shifts) == [("you", -1.0), ("fool", -2.5), ("don't", 3.0), ("we", 0.25)]


def test_a_token_counts_once_and_for_the_first_word_it_touches():
    # " a b" is one token of two words; the second word has no token of its own.
    assert word_shifts([" a b", "c"], [1.0, 2.0]) == [("a", 1.0), ("bc", 2.0)]
    assert word_shifts([" a b"], [1.0]) == [("a", 1.0)]
    # The bytes before the one that completes a character belong to its word.
    assert word_shifts(["", "é", "t", " "], np.array([1.0, 2.0, 4.0, 8.0])) == [("ét", 7.0)]
    assert word_shifts(["...", " "], [1.0, 2.0]) == []
    assert word_shifts([], []) == []


def test_means_by_word_by_hand():
    occurrences = [("fool", -2.0), ("day", 1.0), ("fool", -4.0), ("fool", -3.0), ("day", 0.0), ("rare", -9.0)]
    assert mean_by_word(occurrences, min_count=2) == [WordShift("fool", -3.0, 3), WordShift("day", 0.5, 2)]
    assert [w.word for w in mean_by_word(occurrences, min_count=1)] == ["rare", "fool", "day"]
    assert mean_by_word(occurrences, min_count=4) == []
