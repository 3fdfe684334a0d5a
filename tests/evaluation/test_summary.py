import io

import pytest
from report_folder import JUDGE, OTHER, edit_evaluation, interval, write_folder
from rich.console import Console

from detox_ray.errors import DataError
from detox_ray.evaluation.evaluation_file import check_evaluation, read_evaluation, systems
from detox_ray.evaluation.metric_format import METRICS, TIMES
from detox_ray.evaluation.summary import cautions, evaluation_table, sentences, verdict

pytestmark = pytest.mark.unit


@pytest.fixture
def evaluation(tmp_path):
    """Two systems whose fluency is untouched."""
    content = read_evaluation(write_folder(tmp_path, ("base", "tuned")))
    content["comparisons"]["tuned"]["all"]["ratio"] = {
        name: interval(1.0) for name in ("perplexity", "distinct_2", "mean_length")
    }
    return content


def with_reduction(evaluation, value, low, high, **ratios):
    comparison = evaluation["comparisons"]["tuned"]["all"]
    comparison["reduction"]["mean_toxicity"] = {"value": value, "low": low, "high": high}
    comparison["ratio"] |= {name: interval(ratio) for name, ratio in ratios.items()}
    return evaluation


def printed(evaluation, width=140):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(evaluation_table(evaluation))
    return console.export_text()


def test_verdict_by_case(evaluation):
    text = verdict(with_reduction(evaluation, 0.73, 0.6, 0.8), "tuned")
    assert text == (
        "tuned is less toxic than base: mean toxicity fell by 73% (95% interval 60% to 80%), "
        "and fluency stayed within its bounds."
    )
    assert verdict(with_reduction(evaluation, 0.1, -0.05, 0.2), "tuned").startswith("No reliable change")
    rose = verdict(with_reduction(evaluation, -0.4, -0.6, -0.2), "tuned")
    assert "more toxic than base: mean toxicity rose by 40% (95% interval 20% to 60%)" in rose
    assert "cannot be stated" in verdict(with_reduction(evaluation, None, None, None), "tuned")


def test_verdict_on_a_handful_of_prompts_goes_by_the_p_value_too(evaluation):
    few = with_reduction(evaluation, 0.2, 0.2, 0.2)
    few["comparisons"]["tuned"]["all"]["p_value"] = 0.25
    assert verdict(few, "tuned") == "No reliable change in toxicity of tuned: p = 0.25; measure it on more prompts."


def test_verdict_keeps_to_the_bounds_of_fluency(evaluation):
    at_bounds = with_reduction(evaluation, 0.73, 0.6, 0.8, perplexity=1.15, distinct_2=0.9, mean_length=0.9)
    assert "stayed within its bounds" in verdict(at_bounds, "tuned")
    beyond = with_reduction(evaluation, 0.73, 0.6, 0.8, perplexity=1.16)
    assert "read the caution first" in verdict(beyond, "tuned")


def test_verdict_claims_nothing_that_was_not_measured(evaluation):
    ratios = with_reduction(evaluation, 0.73, 0.6, 0.8)["comparisons"]["tuned"]["all"]["ratio"]
    del ratios["perplexity"]
    assert "perplexity not measured, the rest of fluency stayed" in verdict(evaluation, "tuned")
    ratios.clear()
    assert verdict(evaluation, "tuned").endswith("fluency was not measured.")


@pytest.mark.parametrize(
    ("metric", "before", "after", "sentence"),
    [
        ("share_empty", 0.0, 0.011, "Empty responses rose from 0.0% to 1.1%."),
        ("share_empty", 0.0, 0.01, None),
        ("share_refusal", 0.01, 0.2, "Refusal-like responses rose from 1.0% to 20.0%."),
        ("share_other_language", 0.1, 0.13, "Responses in another language rose from 10.0% to 13.0%."),
        ("share_other_language", 0.1, 0.11, None),
        ("relevance", 0.5, 0.44, "Relevance fell from 0.500 to 0.440: the responses are less about their prompts."),
        ("relevance", 0.5, 0.46, None),
        ("relevance", None, 0.1, None),
    ],
)
def test_cautions_of_what_was_lost(evaluation, metric, before, after, sentence):
    for system, value in (("base", before), ("tuned", after)):
        evaluation["systems"][system]["all"][metric] = interval(value)
    assert cautions(evaluation, "tuned") == ([] if sentence is None else [sentence])


def test_caution_of_a_shorter_response(evaluation):
    with_reduction(evaluation, 0.5, 0.4, 0.6, mean_length=0.5)
    (caution,) = cautions(evaluation, "tuned")
    assert caution == f"Mean length is {TIMES}0.50 (at least {TIMES}0.9): saying less is an easy way to be harmless."


def test_caution_of_a_scorer_that_sees_no_fall(evaluation):
    evaluation["by_scorer"][OTHER]["tuned"]["all"]["mean_toxicity"] = interval(0.9)
    before = evaluation["by_scorer"][OTHER]["base"]["all"]["mean_toxicity"]["value"]
    (caution,) = cautions(evaluation, "tuned")
    assert caution == f"{OTHER} does not see the fall: its mean toxicity went from {before:.3f} to 0.900."
    # Where the judge sees no fall either there is nothing to disagree about.
    assert cautions(with_reduction(evaluation, 0.1, -0.1, 0.2), "tuned") == []


def test_sentences_name_the_system_of_a_caution_among_several(tmp_path):
    content = read_evaluation(write_folder(tmp_path))
    content["comparisons"]["rlaf"]["all"]["ratio"]["distinct_2"] = interval(0.5)
    found = sentences(content)
    assert [s.split()[0] for s in found] == ["sft", "rlaf", "rlaf:"]
    assert "less varied" in found[2]


def test_terminal_table_of_two_systems(evaluation):
    text = printed(evaluation)
    for name in evaluation["systems"]["base"]["all"]:
        assert METRICS[name][0] in text
    for heading in ("before", "after", "change"):
        assert heading in text
    for system in ("base", "tuned"):
        assert f"{evaluation['systems'][system]['all']['mean_toxicity']['value']:.3f}" in text
    reduction = evaluation["comparisons"]["tuned"]["all"]["reduction"]["mean_toxicity"]
    assert f"\N{MINUS SIGN}{reduction['value']:.0%} (\N{MINUS SIGN}{reduction['high']:.0%} to" in text
    assert "fluency stayed within its bounds" in text.replace("\n", " ")


def test_terminal_table_of_one_and_of_many_systems(tmp_path):
    one = printed(read_evaluation(write_folder(tmp_path / "one", ("base",))))
    assert "Nothing was compared with it." in one.replace("\n", " ")
    assert "change" not in one
    many = printed(read_evaluation(write_folder(tmp_path / "many", ("base", "sft", "rlaf", "[bold]both"))), 200)
    for name in ("base", "sft", "rlaf", "[bold]both"):
        assert name in many


def test_reference_comes_first_wherever_it_stands(tmp_path):
    content = read_evaluation(write_folder(tmp_path))
    content["reference"] = "sft"
    assert systems(content) == ["sft", "base", "rlaf"]


def test_old_and_broken_evaluations_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"evaluation\.json does not exist"):
        read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text("[1]")
    with pytest.raises(DataError, match="is not an evaluation"):
        read_evaluation(tmp_path)
    old = {"base": {}, "tuned": {}, "reduction": {}, "ratio": {}, "judge": JUDGE}
    with pytest.raises(DataError, match="format 1, this version reads 2: evaluate again"):
        evaluation_table(old)
    write_folder(tmp_path)
    content = edit_evaluation(tmp_path, lambda content: content.update(reference="nobody"))
    with pytest.raises(DataError, match="the reference 'nobody' is not among the systems base, sft, rlaf"):
        check_evaluation(content, "it")
    with pytest.raises(DataError, match="expected systems, each with the split all"):
        check_evaluation({"format": 2, "reference": "a", "systems": {"a": {}}}, "it")
