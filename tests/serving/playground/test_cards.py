from html.parser import HTMLParser
from typing import Any

import pytest

from detox_ray.serving.playground.answers import Answer, Piece, extended, scored, texts_to_score
from detox_ray.serving.playground.cards import Scorer, SystemLabel, cards

pytestmark = pytest.mark.unit
SYSTEMS = (SystemLabel("Base", "tiny", "RLAF / base"), SystemLabel("RLAF", "after PPO", "RLAF / base"))
SCORERS = (Scorer("judge", in_reward=False), Scorer("member", in_reward=True))


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of_class(self, name: str) -> list[dict[str, Any]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def test_markup_that_a_model_writes_is_text() -> None:
    hostile = "<script>alert(1)</script><img src=x onerror='alert(2)'>\" onmouseover=\"alert(3)"
    page = Page(cards(SYSTEMS, SCORERS, [Answer((Piece(hostile, -1.0, 0.5),)), Answer()], "done", hostile))
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(hostile) == 2


def test_tokens_are_coloured_by_their_shift_and_say_it() -> None:
    shifts = [0.0, 0.21, 0.3, -0.7, 1.7, -3.5]
    pieces = tuple(Piece(f" {i}", -0.5, shift) for i, shift in enumerate(shifts))
    page = Page(cards(SYSTEMS, SCORERS, [Answer(pieces), Answer()], "answering"))
    tokens = page.of_class("token")
    assert [token["class"].split()[1:] for token in tokens] == [[], [], ["more-1"], ["less-2"], ["more-3"], ["less-4"]]
    assert tokens[3]["title"] == "“ 3”: log p −0.50, shift −0.70 (×0.5, RLAF / base)"  # noqa: RUF001


def test_a_base_alone_has_no_legend_and_no_shift() -> None:
    page = Page(cards(SYSTEMS[:1], SCORERS, [Answer((Piece("a", -0.5, None),))], "done"))
    assert page.of_class("scale") == []
    assert page.of_class("token")[0]["title"] == "“a”: log p −0.50"  # noqa: RUF001


def test_every_member_has_its_bar_and_the_judge_is_marked() -> None:
    answers = [Answer((Piece("you fool", -1, 0),)), Answer((Piece(" ", -1, 0), Piece("", -1, 0, ends=True)))]
    assert texts_to_score(answers) == ["you fool"]
    found = scored(answers, {"judge": [0.9], "member": [0.25]})
    assert [dict(answer.toxicity) for answer in found] == [{"judge": 0.9, "member": 0.25}, {}]
    page = Page(cards(SYSTEMS, SCORERS, found, "done"))
    assert [fill["style"] for fill in page.of_class("fill")] == ["width: 90.0%", "width: 25.0%"]
    assert page.text.count("judge, not in the reward") == 2
    assert page.text.count("an empty answer") == 1


def test_an_answer_grows_until_it_ends() -> None:
    answers = extended([Answer(), Answer()], [Piece("a", -1, 0), Piece("b", -1, 0)])
    answers = extended(answers, [None, Piece("c", -1, 0, ends=True)])
    assert [answer.text for answer in answers] == ["a", "bc"]
    page = Page(cards(SYSTEMS, SCORERS, answers, "answering"))
    assert len(page.of_class("caret")) == 1
    assert len(page.of_class("end")) == 1
