"""What is an example in each published format, and what is left out and counted."""

from pathlib import Path

import pytest

from detox_ray.data.examples import read_examples
from detox_ray.errors import DataError

pytestmark = pytest.mark.unit


def said(path: Path, **options) -> list[tuple[tuple[str, ...], str]]:
    return [(e.turns, e.response) for e in read_examples(path, **options).examples]


def test_each_answer_of_a_dialogue_is_an_example_with_all_the_turns_before_it(published: dict[str, Path]) -> None:
    file = read_examples(published["dialoconan"])
    assert file.format == "dialoconan"
    first, second = "You people are fools.", "All of you, silly fools!"
    assert [(e.turns, e.response) for e in file.examples] == [
        ((first,), "Nobody here is a fool."),
        ((first, "Nobody here is a fool.", second), "We would rather talk than call names."),
        (("Go away, you clowns.",), "We are all neighbours here."),
        (("What a bunch of idiots.",), "That is unkind to hear."),
        (("Stupid, all of them.",), "They are as clever as anyone."),
    ]
    assert file.examples[1].meta == {"TARGET": "OTHER", "dialogue_id": "1", "turn_id": "2", "source": "session_1"}


def test_broken_dialogues_are_counted_with_their_place(published: dict[str, Path]) -> None:
    assert read_examples(published["dialoconan"]).left_out == {
        "dialogue that ends without an answer, used up to there (first in line 8)": 1,
        "dialogue whose turns do not alternate, used up to there (first in line 12)": 1,
        "dialogue with an empty turn, used up to there (first in line 15)": 1,
        "dialogue with a missing or repeated turn, used up to there (first in line 18)": 1,
    }


def test_turns_without_number_or_dialogue_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "turns.csv"
    rows = ["text,dialogue_id,turn_id,type", "a,1,0,HS", "b,1,1.0,CN", "c,2,first,HS", "d,,0,HS", "e,3,0.5,HS"]
    path.write_text("\n".join(rows) + "\n")
    file = read_examples(path)
    assert [e.response for e in file.examples] == ["b"]
    assert file.left_out == {
        "turn without a dialogue_id (first in line 5)": 1,
        "dialogue with a turn_id that is no whole number (first in line 4)": 2,
    }


def test_pairs_of_the_published_files(published: dict[str, Path]) -> None:
    assert said(published["multitarget_conan"]) == [
        (("You fools.",), "Nobody is a fool."),
        (("You fools.",), "That is unkind."),
    ]
    assert read_examples(published["multitarget_conan"]).left_out == {"empty response (first in line 4)": 1}
    assert said(published["dialogsum"]) == [(("#Person1#: Hello.\n#Person2#: Hi.",), "They greet each other.")]
    assert read_examples(published["dialogsum"]).left_out == {"empty prompt (first in line 2)": 1}
    assert said(published["paradetox"]) == [
        (("you damn fool",), "you are mistaken"),
        (("you damn fool",), "you are wrong"),
        (("shut up",), "please be quiet"),
    ]
    assert read_examples(published["paradetox"]).left_out == {}


def test_the_references_of_dialogsums_test_split_are_an_example_each(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(
        '{"dialogue": "#Person1#: Hi.", "summary1": "A", "topic1": "t", "summary2": "B", "summary3": "A"}\n'
    )
    file = read_examples(path)
    assert file.format == "dialogsum"
    assert [e.response for e in file.examples] == ["A", "B"]
    assert file.left_out == {"duplicate (first in line 1)": 1}


def test_any_file_of_pairs_is_kept_as_it_is(published: dict[str, Path], tmp_path: Path) -> None:
    file = read_examples(published["pairs"])
    assert file.format == "pairs"
    assert [(e.turns, e.response) for e in file.examples] == [(("The weather is",), " fine today.")]
    assert file.left_out == {"empty response (first in line 2)": 1, "empty prompt (first in line 3)": 1}
    path = tmp_path / "named.csv"
    path.write_text("question,answer\nWhy?,Because.\n")
    assert said(path, prompt_column="question", response_column="answer") == [(("Why?",), "Because.")]
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        '{"toxic": "a", "neutral1": "b", "prompt": "c", "response": 4}\n{"prompt": ["d"], "response": "e"}\n'
    )
    assert said(path) == [(("c",), "4")]
    assert said(path, prompt_column="nothing") == [(("a",), "b")]
    assert read_examples(path).left_out == {"prompt or response that is not text (first in line 2)": 1}


def test_what_cannot_be_read_is_refused_with_the_fix(published: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("prompt,response\n")
    with pytest.raises(DataError, match=r"empty\.csv has no rows"):
        read_examples(tmp_path / "empty.csv")
    (tmp_path / "blank.csv").write_text("prompt,response\n , \n")
    with pytest.raises(DataError, match=r"no example is left \(left out: 1 empty prompt \(first in line 2\)\)"):
        read_examples(tmp_path / "blank.csv")
    with pytest.raises(DataError, match="does not exist"):
        read_examples(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match=r"has no column 'answer'; its columns are prompt, response"):
        read_examples(published["pairs"], response_column="answer")
    with pytest.raises(DataError, match="has no column 'text'"):
        read_examples(published["pairs"], format="dialoconan")


def test_dialoconan_as_it_is_published(shared: Path) -> None:
    file = read_examples(shared / "data" / "conan" / "DIALOCONAN.csv")
    assert file.format == "dialoconan"
    counts = {reason.partition(" (")[0]: count for reason, count in file.left_out.items()}
    # The data's own README says that four dialogues do not alternate.
    assert counts["dialogue whose turns do not alternate, used up to there"] == 4
    assert all(len(e.turns) % 2 == 1 for e in file.examples)
    # 8,311 answers, less duplicates and those behind a break.
    assert 8_311 - counts["duplicate"] - 20 < len(file.examples) < 8_311
    assert read_examples(shared / "data" / "conan" / "Multitarget-CONAN.csv").format == "multitarget_conan"
    assert read_examples(shared / "data" / "paradetox" / "paradetox.tsv").format == "paradetox"
    of_test = read_examples(shared / "data" / "dialogsum" / "dialogsum.test.jsonl")
    assert of_test.format == "dialogsum"
    assert len(of_test.examples) + sum(of_test.left_out.values()) == 3 * 448
