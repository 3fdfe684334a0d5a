import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from detox_ray.data.labelled_texts import read_labelled_texts
from detox_ray.errors import DataError

pytestmark = pytest.mark.unit


def test_nested_fields_and_everything_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    answers = [
        {"text": "a fine day", "toxicity": 0.125, "threat": 0},
        {"text": "you fool", "toxicity": None, "threat": True},
        {"text": "hm", "toxicity": None, "threat": None},
        {"text": None, "toxicity": 0.5, "threat": 1},
        {"text": " ", "toxicity": 0.5, "threat": 1},
        {"text": "last", "toxicity": float("nan"), "threat": 1},
    ]
    path.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers) + "no json\n")
    found = read_labelled_texts(path, "answer.text", ["answer.toxicity", "answer.threat"])
    assert found.texts == ["a fine day", "you fool", "last"]
    assert found.numbers["answer.toxicity"] == pytest.approx([0.125, np.nan, np.nan], nan_ok=True)
    assert found.numbers["answer.threat"].tolist() == [0, 1, 1]
    assert found.missing == {"answer.toxicity": 2, "answer.threat": 0}
    assert found.rows == 6
    assert found.left_out == {
        "no label and no score (first in line 3)": 1,
        "null text (first in line 4)": 1,
        "empty text (first in line 5)": 1,
        "not JSON (first in line 7)": 1,
    }


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_every_kind_of_file_is_read_alike(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"texts.{suffix}"
    frame = pd.DataFrame({"text": ["one, two", "three"], "toxic": [1, 0], "score": [0.25, None]})
    if suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    found = read_labelled_texts(path, "text", ["toxic", "score"])
    assert found.texts == ["one, two", "three"]
    assert found.numbers["toxic"].tolist() == [1, 0]
    assert found.missing == {"toxic": 0, "score": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,toxic\nhello,2\n", "line 2: column 'toxic' has 2, which is not in"),
        ("text,toxic\nhello,-0.5\n", "line 2: column 'toxic' has -0.5, which is not in"),
        ("text,toxic\nhello,a secret\n", "line 2: column 'toxic' holds something that is no number"),
        ("text,toxic\nhello,\n,1\n", "no row can be used"),
        ("text,toxic\n", "has no rows"),
        ("words,toxic\nhello,1\n", "has no column 'text'; its columns are words, toxic"),
        ("text,toxicity\nhello,1\n", "did you mean 'toxicity'"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "texts.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_labelled_texts(path, "text", ["toxic"])
    assert "hello" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_column_without_any_number(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("text,toxic,score\nhello,1,\n")
    with pytest.raises(DataError, match="column 'score' has no number in any of 1 rows"):
        read_labelled_texts(path, "text", ["toxic", "score"])


def test_real_continuations(shared: Path) -> None:
    path = shared / "data" / "realtoxicityprompts" / "random_1k.jsonl"
    found = read_labelled_texts(path, "continuation.text", ["continuation.toxicity"])
    rows = [json.loads(line)["continuation"] for line in path.read_text(encoding="utf-8").splitlines()]
    expected = [row["toxicity"] for row in rows if row["toxicity"] is not None and row["text"].strip()]
    assert found.numbers["continuation.toxicity"].tolist() == expected
    assert found.rows == len(rows) == len(expected) + sum(found.left_out.values())
