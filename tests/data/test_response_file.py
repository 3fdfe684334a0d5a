import json
import math

import numpy as np
import pandas as pd
import pytest

from detox_ray.config import ResponseColumns
from detox_ray.data.response_file import ONLY_SYSTEM, read_responses
from detox_ray.data.tables import MAX_CHARACTERS
from detox_ray.errors import DataError

pytestmark = pytest.mark.unit

TWO_COLUMNS = ResponseColumns(scores={"theirs": "score"})
AWKWARD = ['two\nlines, "quoted"', "", "a nul \0 inside", " spaces ", "na", "résumé 漢字 🙂"]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers_of(path, columns=None):
    file = read_responses(path, columns or ResponseColumns())
    assert list(file.systems) == [ONLY_SYSTEM]
    return file.systems[ONLY_SYSTEM], file


class TestPublishedFiles:
    """RewardLM's result files: pandas' CSV with the index as a column without a name."""

    def test_their_columns(self, tmp_path):
        frame = pd.DataFrame(
            {
                "prompts": ["one, two", "she said"] * 2,
                "responses": ["three.", '"fine",\nhe said', "four", "nothing"],
                "prompt_score": [0.25, 0.5, 0.25, 0.5],
                "response_score": [0.125, 0.75, 1.0, 0.0],
                "pro_API_response_score": [0.5, 0.875, 0.0625, 0.0],
            }
        )
        frame.to_csv(tmp_path / "results.csv")
        columns = ResponseColumns(
            prompt="prompts",
            response="responses",
            prompt_score="prompt_score",
            scores={"roberta": "response_score", "perspective": "pro_API_response_score"},
        )
        answers, file = answers_of(tmp_path / "results.csv", columns)
        assert answers.prompts == ["one, two", "she said"]
        assert answers.responses == [["three.", "four"], ['"fine",\nhe said', "nothing"]]
        np.testing.assert_array_equal(answers.prompt_scores, [0.25, 0.5])
        np.testing.assert_array_equal(answers.scores["roberta"], [[0.125, 1.0], [0.75, 0.0]])
        np.testing.assert_array_equal(answers.scores["perspective"], [[0.5, 0.0625], [0.875, 0.0]])
        assert file.left_out == {}
        assert file.noted == {}


class TestFormats:
    @pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
    def test_every_format_gives_the_same_texts(self, kind, tmp_path):
        path = tmp_path / f"responses.{kind}"
        frame = pd.DataFrame({"prompt": [f"prompt {i}" for i in range(6)], "response": AWKWARD, "score": [0.5] * 6})
        match kind:
            case "jsonl":
                write_jsonl(path, frame.to_dict("records"))
            case "parquet":
                frame.to_parquet(path)
            case _:
                frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
        answers, file = answers_of(path, TWO_COLUMNS)
        assert [response for [response] in answers.responses] == AWKWARD
        assert answers.scores["theirs"].tolist() == [[0.5]] * 6
        assert list(file.noted.values()) == [1]
        assert next(iter(file.noted)).startswith("empty response, kept")

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_nested_objects_are_dotted_columns(self, kind, tmp_path):
        rows = [{"prompt": {"text": "who", "toxicity": 0.5}, "generation": {"text": "you"}}]
        path = tmp_path / f"nested.{kind}"
        write_jsonl(path, rows) if kind == "jsonl" else pd.DataFrame(rows).to_parquet(path)
        columns = ResponseColumns(prompt="prompt.text", prompt_score="prompt.toxicity", response="generation.text")
        answers, _ = answers_of(path, columns)
        assert (answers.prompts, answers.responses, answers.prompt_scores.tolist()) == (["who"], [["you"]], [0.5])

    def test_a_byte_order_mark_is_not_part_of_the_first_column(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,response\na,b\n")
        assert answers_of(tmp_path / "a.csv")[0].prompts == ["a"]
        (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\n')
        assert answers_of(tmp_path / "a.jsonl")[0].prompts == ["a"]

    def test_several_systems(self, tmp_path):
        rows = [
            {"prompt": p, "response": f"{s} answers {p}", "model": s}
            for s in ("base", "tuned")
            for p in ("first", "second")
        ]
        file = read_responses(write_jsonl(tmp_path / "a.jsonl", rows), ResponseColumns(system="model"))
        assert list(file.systems) == ["base", "tuned"]
        assert file.systems["tuned"].responses == [["tuned answers first"], ["tuned answers second"]]


class TestColumns:
    def test_a_missing_column_names_those_there_are_and_the_nearest(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"prompts": "a", "responses": "b"}])
        with pytest.raises(
            DataError, match=r"no column 'prompt', 'response'.*prompts, responses.*did you mean 'prompts'"
        ):
            read_responses(path, ResponseColumns())
        with pytest.raises(DataError, match=r"no column 'zzz'.*name one of them"):
            read_responses(path, ResponseColumns(prompt="prompts", response="responses", prompt_score="zzz"))

    def test_two_columns_of_one_name(self, tmp_path):
        (tmp_path / "a.csv").write_text("prompt,response,response\na,b,c\n")
        with pytest.raises(DataError, match="two columns 'response'"):
            read_responses(tmp_path / "a.csv", ResponseColumns())

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", b"", "no rows"),
            ("a.jsonl", b"\n\n", "no rows"),
            ("a.jsonl", b"[1]\n{", r"no rows \(left out: 1 not a JSON object \(first in line 1\), 1 not JSON"),
            ("a.csv", b"prompt,response\n", "no rows"),
            ("a.xlsx", b"PK", "unknown kind of file '.xlsx'; give one of .jsonl"),
            ("a.parquet", b"not parquet", "cannot be read as Parquet"),
            ("a.csv", "prompt,response\na,b\n".encode("utf-16"), "is UTF-16"),
            ("a.csv", b'prompt,response\na,"b\n', "line 2.*is a quote not closed"),
            ("a.csv", b"pr\xffmpt,response\na,b\n", "names of the columns, is not UTF-8"),
        ],
    )
    def test_files_that_cannot_be_read(self, name, content, message, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_responses(tmp_path / name, ResponseColumns())

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(DataError, match="does not exist"):
            read_responses(tmp_path / "a.csv", ResponseColumns())
        with pytest.raises(DataError, match="is a folder"):
            read_responses(tmp_path, ResponseColumns())


class TestLeftOut:
    def test_every_reason_is_counted_with_its_first_line(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(
            b'{"prompt": "a", "response": "kept", "score": 0.5}\n'
            b'{"prompt": null, "response": "b", "score": 0.5}\n'
            b'{"prompt": "b", "response": null, "score": 0.5}\n'
            b'{"prompt": "c", "response": NaN, "score": 0.5}\n'
            b'{"prompt": "d", "response": 7, "score": 0.5}\n'
            b'{"prompt": "e", "response": "b", "score": null}\n'
            b'{"prompt": "f", "response": "b"}\n'
            b'{"prompt": "g", "response": "b", "score": NaN}\n'
            b'{"prompt": "h", "response": "b", "score": "high"}\n'
            b'{"prompt": "caf\xe9", "response": "b", "score": 0.5}\n'
            b'{"prompt": "i", "response": "half \\ud83d a character", "score": 0.5}\n'
            b'{"prompt": "j", "response": "whole \\ud83d\\ude42 one", "score": 0.5}\n'
            b'["k"]\n'
            b'{"prompt": "l", "resp'
        )
        answers, file = answers_of(path, TWO_COLUMNS)
        assert answers.prompts == ["a", "j"]
        assert answers.responses == [["kept"], ["whole 🙂 one"]]
        assert file.left_out == {
            "null prompt (first in line 2)": 1,
            "null response (first in line 3)": 2,
            "response is not text (first in line 5)": 1,
            "null score in column 'score' (first in line 6)": 2,
            "NaN score in column 'score' (first in line 8)": 1,
            "score is not a number in column 'score' (first in line 9)": 1,
            "not UTF-8 (first in line 10)": 2,
            "not a JSON object (first in line 13)": 1,
            "not JSON (first in line 14)": 1,
        }

    def test_csv_rows(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_bytes(
            b'prompt,response,score\na,"two\nlines",0.5\nb,caf\xe9,0.5\nc,one\nd,x,y,0.5\n'
            b"e,no score,\nf,nan,NaN\n\ng,fine,1e-2\n"
        )
        answers, file = answers_of(path, TWO_COLUMNS)
        assert answers.prompts == ["a", "g"]
        assert answers.responses == [["two\nlines"], ["fine"]]
        assert file.left_out == {
            "not UTF-8 (first in line 4)": 1,
            "wrong number of fields (first in line 5)": 2,
            "null score in column 'score' (first in line 7)": 1,
            "NaN score in column 'score' (first in line 8)": 1,
        }

    def test_null_and_nan_in_parquet(self, tmp_path):
        frame = pd.DataFrame(
            {"prompt": list("abcd"), "response": ["x", None, "y", "z"], "score": [0.5, 0.5, None, 1.0]}
        )
        frame.to_parquet(tmp_path / "a.parquet")
        answers, file = answers_of(tmp_path / "a.parquet", TWO_COLUMNS)
        assert answers.prompts == ["a", "d"]
        assert sorted(file.left_out.values()) == [1, 1]
        assert any("row 2" in reason for reason in file.left_out)

    def test_nothing_left(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "response": None}])
        with pytest.raises(DataError, match=r"no response is left \(left out: 1 null response"):
            read_responses(path, ResponseColumns())

    def test_long_texts(self, tmp_path):
        rows = [
            {"prompt": "a", "response": "x" * MAX_CHARACTERS},
            {"prompt": "b", "response": "y" * (MAX_CHARACTERS + 1)},
            {"prompt": "c" * (MAX_CHARACTERS + 1), "response": "z"},
        ]
        answers, file = answers_of(write_jsonl(tmp_path / "a.jsonl", rows))
        assert [len(r) for [r] in answers.responses] == [MAX_CHARACTERS, MAX_CHARACTERS]
        assert file.noted == {"response cut to 100,000 characters (first in line 2)": 1}
        assert file.left_out == {"prompt of more than 100,000 characters (first in line 3)": 1}

    def test_a_long_field_of_a_csv(self, tmp_path):
        # Python's own limit is 131,072 characters.
        pd.DataFrame({"prompt": ["a"], "response": ["y" * 200_000]}).to_csv(tmp_path / "a.csv")
        assert len(answers_of(tmp_path / "a.csv")[0].responses[0][0]) == MAX_CHARACTERS


class TestScores:
    @pytest.mark.parametrize("values", [[0.0, 87.5], [-0.5, 1.0], [0.5, math.inf]])
    def test_outside_the_range(self, values, tmp_path):
        rows = [{"prompt": str(i), "response": "x", "score": value} for i, value in enumerate(values)]
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(DataError, match=r"column 'score' has scores from .* not in \[0, 1\].*score_scale=100"):
            read_responses(path, TWO_COLUMNS)

    def test_percent(self, tmp_path):
        rows = [{"prompt": "a", "response": "x", "score": 87.5, "p": 12.5}]
        columns = ResponseColumns(scores={"theirs": "score"}, prompt_score="p", score_scale=100)
        answers, _ = answers_of(write_jsonl(tmp_path / "a.jsonl", rows), columns)
        assert answers.scores["theirs"].tolist() == [[0.875]]
        assert answers.prompt_scores.tolist() == [0.125]

    def test_a_prompt_without_a_published_score_is_kept(self, tmp_path):
        rows = [
            {"prompt": "a", "response": "x", "p": None},
            {"prompt": "a", "response": "y", "p": 0.5},
            {"prompt": "b", "response": "x", "p": None},
            {"prompt": "b", "response": "z", "p": None},
            {"prompt": "c", "response": "x", "p": 0.25},
            {"prompt": "c", "response": "x", "p": 0.75},
        ]
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        answers, file = answers_of(path, ResponseColumns(prompt_score="p"))
        np.testing.assert_array_equal(answers.prompt_scores, [0.5, math.nan, 0.25])
        assert file.noted == {
            "prompt without a published score, kept (first in line 1)": 3,
            "prompt with several published scores, the first kept": 1,
        }


class TestSamples:
    ROWS = (*(["a", f"a{i}"] for i in range(3)), ["b", "b0"], *(["a", f"a{i}"] for i in range(3, 5)), ["b", "b1"])

    def file(self, tmp_path):
        return write_jsonl(tmp_path / "a.jsonl", [{"prompt": p, "response": r} for p, r in self.ROWS])

    def test_different_numbers_are_refused_with_the_counts(self, tmp_path):
        with pytest.raises(DataError, match=r"\(5 for 1 prompts, 2 for 1 prompts\).*samples=fewest to use the first 2"):
            read_responses(self.file(tmp_path), ResponseColumns())

    def test_or_reduced_to_the_fewest(self, tmp_path):
        answers, file = answers_of(self.file(tmp_path), ResponseColumns(samples="fewest"))
        assert answers.responses == [["a0", "a1"], ["b0", "b1"]]
        assert file.left_out == {"more than 2 responses to the prompt": 3}

    def test_of_all_systems(self, tmp_path):
        rows = [{"prompt": "a", "response": str(i), "s": s} for s, n in (("base", 3), ("tuned", 2)) for i in range(n)]
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(DataError, match="different numbers"):
            read_responses(path, ResponseColumns(system="s"))
        file = read_responses(path, ResponseColumns(system="s", samples="fewest"))
        assert file.systems["base"].responses == file.systems["tuned"].responses == [["0", "1"]]
