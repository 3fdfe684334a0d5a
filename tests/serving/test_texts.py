import itertools

import pytest

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import RewardConfig
from detox_ray.serving.texts import joined, sentence_spans, texts_to_read, utf16_offsets

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("What a day. You fool!", ["What a day.", "You fool!"]),
        ("  one line\n\nanother line  ", ["one line", "another line"]),
        ('He said "no." Then he left...', ['He said "no."', "Then he left..."]),
        ("version 3.5 is out", ["version 3.5 is out"]),
        ("今日は。いい天気。", ["今日は。", "いい天気。"]),
        ("no end", ["no end"]),
        ("?!", ["?!"]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert [text[begin:end] for begin, end in sentence_spans(text, 10)] == sentences


@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_a_text_without_words_is_one_span(text: str) -> None:
    assert sentence_spans(text, 10) == [(0, len(text))]


@pytest.mark.parametrize("run", [".", "。.", "?!"])
def test_a_long_run_of_stops_inside_a_text_is_read_once(run: str) -> None:
    text = run * 500_000 + "x"
    spans = sentence_spans(text, 10)
    assert (spans[0][0], spans[-1][1]) == (0, len(text))


def test_stops_inside_a_text_and_at_its_end() -> None:
    text = "a..b ...c.) d。.e。 f?!x!"
    assert [text[begin:end] for begin, end in sentence_spans(text, 10)] == ["a..b ...c.)", "d。", ".e。", "f?!x!"]


def test_many_sentences_are_merged_and_none_is_lost() -> None:
    text = " ".join(f"This is {i}." for i in range(1000))
    spans = sentence_spans(text, 7)
    assert len(spans) == 7
    assert (spans[0][0], spans[-1][1]) == (0, len(text))
    assert all(text[a_end:b_begin] == " " for (_, a_end), (b_begin, _) in itertools.pairwise(spans))


def test_offsets_in_utf16_are_those_of_the_codec() -> None:
    text = "Hi 😀! Grüße an dich 👋🏽. Ende."
    spans = sentence_spans(text, 10)
    units = text.encode("utf-16-le")
    for (begin, end), (first, last) in zip(spans, utf16_offsets(text, spans), strict=True):
        assert units[2 * first : 2 * last].decode("utf-16-le") == text[begin:end]
    assert utf16_offsets(text, spans)[0] == (0, 6)


def test_prompt_and_response_as_one_text() -> None:
    assert (joined("hello", "you"), joined("hello ", "you"), joined("hello", "!")) == (
        "hello you",
        "hello you",
        "hello!",
    )
    member = ClassifierConfig(name="m", kind="linear", model="a:b")
    config = RewardConfig(classifiers=[member], text="prompt_and_response")
    assert texts_to_read(["you"], ["hello"], config) == ["hello you"]
