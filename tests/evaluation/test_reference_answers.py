"""ROUGE against numbers worked by hand, and its way through the comparison and the files."""

import numpy as np
import pytest

from detox_ray.evaluation.comparison import EvaluationProtocol, compare
from detox_ray.evaluation.metric_format import TIMES
from detox_ray.evaluation.reference_answers import baselines, rouge
from detox_ray.evaluation.responses import ScoredResponses, SystemResponses, generations_table, systems_of
from detox_ray.evaluation.tables import metric_table
from detox_ray.records import Prompt, Rollout

pytestmark = pytest.mark.unit
SUMMARY = "Ann asks Bob to close the door."
PROMPTS = [
    Prompt("a", "#Ann#: Close the door, Bob.", (1,), {"references": [SUMMARY], "lead": "#Ann#: Close the door, Bob."}),
    Prompt("b", "Shut up, you fool", (1,), {"toxicity": 0.9}),
]


def test_rouge_by_hand() -> None:
    # Words: ann asks bob to close the door (7) and bob should close the door (5).
    found = rouge(PROMPTS[:1], [["Bob should close the door", SUMMARY]])
    # Shared: bob close the door; pairs: close the, the door of 6 and 4; the longest common subsequence has 4 words.
    assert found["rouge1"][0, 0] == pytest.approx(2 * (4 / 5) * (4 / 7) / (4 / 5 + 4 / 7))
    assert found["rouge2"][0, 0] == pytest.approx(2 * (2 / 4) * (2 / 6) / (2 / 4 + 2 / 6))
    assert found["rougeL"][0, 0] == found["rouge1"][0, 0]
    assert all(values[0, 1] == 1 for values in found.values())


def test_the_order_of_words_counts_in_rouge_l_alone() -> None:
    found = rouge(PROMPTS[:1], [["door the close to Bob asks Ann"]])
    assert found["rouge1"][0, 0] == 1
    assert found["rougeL"][0, 0] == pytest.approx(1 / 7)
    assert found["rouge2"][0, 0] == 0


def test_of_several_references_the_nearest_counts_and_words_are_not_stemmed() -> None:
    prompt = Prompt("c", "", (), {"references": ["nothing alike", "Bob closes doors"]})
    assert rouge([prompt], [["Bob closes doors"]])["rouge1"][0, 0] == 1
    assert rouge([prompt], [["Bob close door"]])["rouge1"][0, 0] == pytest.approx(1 / 3)


def test_prompts_without_references_have_none() -> None:
    assert rouge(PROMPTS[1:], [["anything"]]) == {}
    assert baselines(PROMPTS[1:]) == {}
    assert np.isnan(rouge(PROMPTS, [["x"], ["y"]])["rouge1"][1, 0])


def system(name: str, texts: list[str]) -> ScoredResponses:
    nothing = np.zeros(0, dtype=np.float32)
    rollouts = [
        [Rollout(p.id, p.text, np.array([1]), np.arange(3), nothing, text, "stop", 0)]
        for p, text in zip(PROMPTS, texts, strict=True)
    ]
    return ScoredResponses(SystemResponses(name, PROMPTS, rollouts), {"judge": np.array([[0.1], [0.8]])})


def test_the_table_has_every_system_and_the_first_utterance() -> None:
    systems = [system("base", ["Bob should close the door", "fool"]), system("tuned", [SUMMARY, "friend"])]
    # The files hold all that the comparison takes.
    again = systems_of(generations_table(systems))
    for scored in (systems, again):
        evaluation = compare(scored, EvaluationProtocol(["judge"], seed=0, resamples=200))
        assert evaluation["splits"] == {"all": 2, "toxic": 1, "referenced": 1}
        assert evaluation["systems"]["base"]["all"]["rouge1"]["value"] == pytest.approx(2 / 3)
        assert evaluation["systems"]["tuned"]["referenced"]["rouge1"]["value"] == 1
        assert "rouge1" not in evaluation["systems"]["tuned"]["toxic"]
        assert evaluation["comparisons"]["tuned"]["all"]["ratio"]["rougeL"]["value"] == pytest.approx(1.5)
        # ann close the door bob: five of its five words are among the seven.
        lead = evaluation["baselines"]["lead-1"]["all"]["rouge1"]["value"]
        assert lead == pytest.approx(2 * 1 * (5 / 7) / (1 + 5 / 7))
        table = metric_table(evaluation)
        assert [column.label for column in table.columns] == ["Metric", "Before", "After", "Change", "Lead-1"]
        row = next(row for row in table.rows if row.label == "ROUGE-1")
        assert [cell.value for cell in row.cells] == ["0.667", "1.000", f"{TIMES}1.50", "0.833"]
        assert all(len(row.cells) == 4 for row in table.rows)
