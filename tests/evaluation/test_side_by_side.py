"""Folders that were evaluated one by one, in one evaluation."""

import pytest
from report_folder import edit_evaluation, read_rows, write_folder, write_rows

from detox_ray.errors import DataError
from detox_ray.evaluation.report import write_report
from detox_ray.evaluation.side_by_side import compare_folders

pytestmark = pytest.mark.unit
SAMPLING = {"max_new_tokens": 20, "temperature": 0.7, "top_p": 1.0, "top_k": 0}


@pytest.fixture
def folders(tmp_path):
    """Two folders, each of a base and a tuned system, on the same prompts."""
    found = [write_folder(tmp_path / name, ("base", name), seed) for seed, name in enumerate(("first", "second"))]
    for folder in found:
        edit_evaluation(folder, lambda content: content.update(sampling=SAMPLING))
    return found


def test_systems_sampled_differently_are_refused(folders, tmp_path):
    edit_evaluation(folders[1], lambda content: content["sampling"].update(temperature=1.0))
    with pytest.raises(
        DataError, match=r"^sampling is .*0\.7.* in .*first and .*1\.0.* in .*second; evaluate"
    ) as error:
        compare_folders(folders, tmp_path / "both", resamples=20)
    assert "\n" not in str(error.value)


def test_the_common_sampling_is_said(folders, tmp_path):
    edit_evaluation(folders[0], lambda content: content.pop("sampling"))
    evaluation = compare_folders(folders, tmp_path / "both", resamples=20)
    assert list(evaluation["systems"]) == ["base", "first", "second"]
    assert evaluation["sampling"] == SAMPLING
    write_report(tmp_path / "both")
    assert "temperature 0.7" in (tmp_path / "both" / "model_card.md").read_text()
    assert "Longest response, tokens: 20" in (tmp_path / "both" / "report.md").read_text()


def test_files_alone_have_no_sampling(folders, tmp_path):
    for folder in folders:
        edit_evaluation(folder, lambda content: content.pop("sampling"))
    assert "sampling" not in compare_folders(folders, tmp_path / "both", resamples=20)


def test_splits_of_any_folder_are_kept(folders, tmp_path):
    """The first folder knows nothing of its prompts."""
    splits = compare_folders(folders, tmp_path / "known", resamples=20)["splits"]
    rows = [row | {"prompt_toxicity": None, "challenging": None} for row in read_rows(folders[0])]
    write_rows(folders[0], rows)
    assert compare_folders(folders, tmp_path / "both", resamples=20)["splits"] == splits
    assert all(row["prompt_toxicity"] is not None for row in read_rows(tmp_path / "both"))
