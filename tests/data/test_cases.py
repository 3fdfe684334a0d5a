"""Labelled cases: every row is a case or is counted with a reason."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from detox_ray.data.cases import MAX_VALUES, CaseColumns, CaseLabels, read_cases
from detox_ray.errors import ConfigError, DataError

pytestmark = pytest.mark.unit

PLAIN = CaseColumns("text", "label", "group")
HATECHECK = """,functionality,case_id,test_case,label_gold,target_ident,direction
0,ident_neutral_nh,1,"I know a group-a, and a group-b.",non-hateful,group-a,-
1,derog_neg_emote_h,2,You group-b are all fools.,hateful,group-b,directed
2,target_obj_nh,3,This stupid door!,non-hateful,,-
"""


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def case(text: object, label: object, group: object = "group-a") -> dict:
    return {"text": text, "label": label, "group": group}


def test_hatecheck_format(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text(HATECHECK)
    cases = read_cases(path)
    assert cases.texts == ["I know a group-a, and a group-b.", "You group-b are all fools.", "This stupid door!"]
    assert cases.toxic.tolist() == [False, True, False]
    assert cases.groups == ["group-a", "group-b", None]
    assert cases.functionalities == ["ident_neutral_nh", "derog_neg_emote_h", "target_obj_nh"]
    assert (cases.rows, cases.left_out, cases.noted) == (3, {}, {})


def test_every_row_is_a_case_or_counted(tmp_path):
    rows = [
        case("hello group-a", "neutral"),
        case(None, "toxic"),
        case("  ", "toxic"),
        case(7, "toxic"),
        {"label": "toxic", "group": "group-a"},
        case("you fool", "perhaps"),
        case("you fool", None),
        case("you fool", ""),
        "not json",
        case("hello group-a", "neutral"),
        case("hello group-a", "neutral", "group-b"),
        case("silly group-a", "toxic"),
        case("silly group-a", "neutral"),
        case("x" * 100_001, "neutral"),
    ]
    cases = read_cases(write_jsonl(tmp_path / "cases.jsonl", rows), PLAIN)
    assert [text[:13] for text in cases.texts] == ["hello group-a", "hello group-a", "x" * 13]
    assert cases.groups == ["group-a", "group-b", "group-a"]
    assert len(cases.texts[2]) == 100_000
    assert cases.noted == {"text cut to 100,000 characters (first in line 14)": 1}
    assert cases.left_out == {
        "null text (first in line 2)": 2,
        "empty text (first in line 3)": 1,
        "text is not text (first in line 4)": 1,
        "unknown label (first in line 6)": 1,
        "null label (first in line 7)": 2,
        "not JSON (first in line 9)": 1,
        "duplicate (first in line 10)": 1,
        "both labels for one text (first in line 12)": 2,
    }
    # The line that is no JSON is no row; all others are accounted for.
    assert len(cases.texts) + sum(cases.left_out.values()) - 1 == cases.rows == 13


@pytest.mark.parametrize("labels", [[True, False], [1, 0], [1.0, 0.0], [" Toxic", "NON-TOXIC"], ["hateful", "neutral"]])
def test_labels_of_every_kind(tmp_path, labels):
    table = pa.table({"text": ["you fool", "you friend"], "label": labels, "group": [None, "group-a"]})
    pq.write_table(table, tmp_path / "cases.parquet")
    assert read_cases(tmp_path / "cases.parquet", PLAIN).toxic.tolist() == [True, False]


def test_functionalities_are_read_where_the_file_has_them(tmp_path):
    rows = [case("you fool", 1), case("you friend", 0)]
    assert read_cases(write_jsonl(tmp_path / "plain.jsonl", rows), PLAIN).functionalities is None
    kinds = [row | {"functionality": kind} for row, kind in zip(rows, ("slur_h", None), strict=True)]
    assert read_cases(write_jsonl(tmp_path / "kinds.jsonl", kinds), PLAIN).functionalities == ["slur_h", "(none)"]


def test_labels_named_by_the_caller(tmp_path):
    path = write_jsonl(tmp_path / "cases.jsonl", [case("you fool", "rude"), case("you friend", "civil")])
    cases = read_cases(path, PLAIN, CaseLabels(toxic=("Rude",), nontoxic=("civil",)))
    assert cases.toxic.tolist() == [True, False]
    with pytest.raises(
        DataError, match=r"no case is left.*2 unknown label.*'label' has 'civil', 'rude'; known are 0, "
    ):
        read_cases(path, PLAIN)


@pytest.mark.parametrize(
    ("toxic", "nontoxic", "message"),
    [(("a", "B"), ("b",), "'b' is named as toxic and as not toxic"), ((), ("b",), "name at least one")],
)
def test_labels_that_contradict_themselves(toxic, nontoxic, message):
    with pytest.raises(ConfigError, match=message):
        CaseLabels(toxic, nontoxic).meanings()


def test_a_label_column_of_texts_is_not_quoted(tmp_path):
    path = write_jsonl(tmp_path / "cases.jsonl", [case("you fool", f"private text {i}") for i in range(30)])
    with pytest.raises(DataError, match="has 30 different values: name the column with the labels") as error:
        read_cases(path, PLAIN)
    assert "private" not in str(error.value)


def test_a_column_that_holds_no_groups(tmp_path):
    path = write_jsonl(tmp_path / "cases.jsonl", [case(f"text {i}", 0, f"name {i}") for i in range(MAX_VALUES + 1)])
    with pytest.raises(DataError, match=f"'group' has {MAX_VALUES + 1} different values, more than {MAX_VALUES}"):
        read_cases(path, PLAIN)


def test_missing_columns_and_files(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text("text,label,grup\nyou fool,toxic,group-a\n")
    with pytest.raises(DataError, match=r"no column 'group'; its columns are text, label, grup: did you mean 'grup'"):
        read_cases(path, PLAIN)
    with pytest.raises(DataError, match="no column 'test_case', 'label_gold', 'target_ident'"):
        read_cases(path)
    with pytest.raises(DataError, match="does not exist"):
        read_cases(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("text,label,group\n")
    with pytest.raises(DataError, match="has no rows"):
        read_cases(tmp_path / "empty.csv", PLAIN)


def test_real_hatecheck(shared):
    cases = read_cases(shared / "data" / "hatecheck" / "test_suite_cases.csv")
    assert len(cases.texts) == cases.rows == 3355
    assert not cases.left_out
    # As `pandas.crosstab` counts them.
    assert int(cases.toxic.sum()) == 2322
    assert cases.groups.count(None) == 258
    assert cases.functionalities is not None
    assert cases.functionalities.count("ident_neutral_nh") == 107
    assert cases.functionalities.count("ident_pos_nh") == 171
