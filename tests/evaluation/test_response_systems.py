"""Files of responses with scores of their own, from the file to evaluation.json."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from detox_ray import ConfigError, evaluate

pytestmark = pytest.mark.unit
PROMPTS = 30


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Two systems on the same prompts, each in an order of its own; the second a tenth less toxic on each."""
    path = tmp_path / "published.csv"
    rng = np.random.default_rng(0)
    toxicity = rng.uniform(0.1, 1.0, PROMPTS)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "response", "system", "score", "prompt_score", "group"])
        for system, factor in (("before", 1.0), ("after", 0.9)):
            for i in rng.permutation(PROMPTS):
                score = f"{factor * toxicity[i]:.6f}"
                rows.writerow([f"prompt {i}", f"answer {i} of {system}", system, score, f"{toxicity[i]:.6f}", i % 3])
    return path


COLUMNS = "systems.0.columns={system: system, prompt_score: prompt_score, scores: {theirs: score}}"


def test_scores_stay_with_their_responses(published: Path, tmp_path: Path) -> None:
    evaluation = evaluate(published, [f"output_dir={tmp_path}", "scorers=[]", COLUMNS], quiet=True)
    reduction = evaluation["comparisons"]["after"]["all"]["reduction"]["mean_toxicity"]
    assert (reduction["low"], reduction["value"], reduction["high"]) == pytest.approx((0.1, 0.1, 0.1), abs=1e-4)
    assert evaluation["splits"]["toxic"] + evaluation["splits"]["nontoxic"] == PROMPTS
    rows = pq.read_table(tmp_path / "evaluation-published" / "generations.parquet").to_pylist()
    by_response = {row["response"]: row["toxicity"] for row in rows}
    for i in range(PROMPTS):
        assert by_response[f"answer {i} of after"] == pytest.approx(
            0.9 * by_response[f"answer {i} of before"], abs=1e-5
        )
    assert "sampling" not in evaluation


def test_a_score_under_the_name_of_a_scorer_is_refused(published: Path, tmp_path: Path) -> None:
    columns = COLUMNS.replace("theirs", "alt-profanity-check")
    with pytest.raises(ConfigError, match=r"'alt-profanity-check' is a scorer and a column of scores of 'before'"):
        evaluate(published, [f"output_dir={tmp_path}", columns], quiet=True)
