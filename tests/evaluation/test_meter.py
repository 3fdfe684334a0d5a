import json
import math

import numpy as np
import pytest
from profanity_check import predict_prob

from detox_ray.config import EvaluationConfig
from detox_ray.errors import DataError, RewardError
from detox_ray.evaluation import metrics
from detox_ray.evaluation.meter import measure, write_evaluation
from detox_ray.evaluation.perplexity import perplexity, response_nll
from detox_ray.evaluation.responses import group_rollouts, read_generations
from detox_ray.evaluation.summary import read_evaluation

pytestmark = pytest.mark.unit

PAD_ID, END_ID = 0, 1
RUDE = ["you are a stupid idiot", "what a dumb stupid question", "shut up you moron", "only an idiot would ask that"]
CIVIL = ["thank you for asking that", "let us look at it together", "that is a good question", "here is what i know"]


class ProfanityCheck:
    name = "alt-profanity-check"

    def toxicity(self, texts: list[str]) -> np.ndarray:
        return np.asarray(predict_prob(texts))


class ConstantJudge:
    name = "constant"

    def __init__(self, scores):
        self.scores = scores

    def toxicity(self, texts):
        return self.scores


@pytest.fixture(scope="module")
def systems(make_rollouts):
    """Base: three rude responses of four. Tuned: one of four, and one empty. 12 prompts x 4, tuned in reverse order."""
    base = [[RUDE[p % 4], RUDE[(p + 1) % 4], RUDE[(p + 2) % 4], CIVIL[p % 4]] for p in range(12)]
    tuned = [[CIVIL[p % 4], CIVIL[(p + 1) % 4], RUDE[p % 4], "" if p == 3 else CIVIL[p % 3]] for p in range(12)]
    return (
        group_rollouts("base", make_rollouts(base)),
        group_rollouts("tuned", list(reversed(make_rollouts(tuned, version=7)))),
    )


@pytest.fixture(scope="module")
def evaluation(systems, tiny_llama):
    config = EvaluationConfig(bootstrap_resamples=300)
    return measure(*systems, ProfanityCheck(), tiny_llama, PAD_ID, {END_ID}, config, seed=3)


def test_measure_against_the_metrics_computed_apart(systems, evaluation, tiny_llama):
    content = evaluation.to_json()
    for key, system in zip(("base", "tuned"), systems, strict=True):
        rollouts = [r for samples in system.rollouts for r in samples]
        toxicity = np.asarray(predict_prob([r.text for r in rollouts])).reshape(12, 4)
        assert content[key]["mean_toxicity"] == pytest.approx(metrics.mean_toxicity(toxicity))
        assert content[key]["share_toxic"] == pytest.approx(metrics.share_toxic(toxicity))
        assert content[key]["expected_maximum_toxicity"] == pytest.approx(metrics.expected_maximum_toxicity(toxicity))
        assert content[key]["toxicity_probability"] == pytest.approx(metrics.toxicity_probability(toxicity))
        words = [r.text.split() for r in rollouts]
        assert content[key]["mean_length"] == pytest.approx(sum(map(len, words)) / 48)
        assert content[key]["share_empty"] == sum(not w for w in words) / 48
        without_end = [r.response_ids[:-1].tolist() for r in rollouts]
        nll, tokens = response_nll(tiny_llama, [r.prompt_ids for r in rollouts], without_end, 16, PAD_ID)
        assert content[key]["perplexity"] == pytest.approx(perplexity(nll, tokens), rel=1e-5)
        for name, value in content[key].items():
            interval = content["intervals"][key][name]
            assert interval["low"] - 1e-9 <= value <= interval["high"] + 1e-9
    base, tuned = content["base"], content["tuned"]
    assert content["reduction"]["mean_toxicity"]["value"] == pytest.approx(
        1 - tuned["mean_toxicity"] / base["mean_toxicity"]
    )
    assert content["ratio"]["perplexity"] == pytest.approx(tuned["perplexity"] / base["perplexity"])
    assert content["ratio"]["mean_length"] == pytest.approx(tuned["mean_length"] / base["mean_length"])
    assert content["reduction"]["mean_toxicity"]["low"] > 0.3
    assert content["p_value"] < 0.02


def test_json_has_the_published_shape(evaluation):
    content = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    for system in ("base", "tuned"):
        assert {
            "mean_toxicity",
            "share_toxic",
            "expected_maximum_toxicity",
            "toxicity_probability",
            "perplexity",
            "distinct_2",
            "distinct_2_per_prompt",
            "mean_length",
            "share_empty",
            "repetition",
        } == content[system].keys()
    assert content["reduction"].keys() == {
        "mean_toxicity",
        "share_toxic",
        "expected_maximum_toxicity",
        "toxicity_probability",
    }
    assert all({"value", "low", "high"} == r.keys() for r in content["reduction"].values())
    assert content["ratio"].keys() == {"perplexity", "distinct_2", "mean_length"}
    assert (content["judge"], content["prompts"], content["samples_per_prompt"]) == ("alt-profanity-check", 12, 4)
    assert (content["seed"], content["threshold"]) == (3, 0.5)
    assert "torch" in content["versions"]


def test_files_hold_every_response_with_its_scores(evaluation, systems, tmp_path):
    write_evaluation(tmp_path, evaluation, steps=3)
    assert read_evaluation(tmp_path) == json.loads(json.dumps(evaluation.to_json())) | {"steps": 3}
    rows = read_generations(tmp_path / "generations.parquet").to_pylist()
    assert len(rows) == 96
    tuned = [row for row in rows if row["system"] == "tuned"]
    assert {row["adapter_version"] for row in tuned} == {7}
    for row in tuned:
        assert row["tokens"] == len(row["response_ids"]) == len(row["response"].split())
        assert row["toxicity"] == pytest.approx(predict_prob([row["response"]])[0])
        assert (row["nll"] > 0) == (row["tokens"] > 0)
    # The metrics can be had again from the file alone.
    matrix = np.array([row["toxicity"] for row in tuned]).reshape(12, 4)
    assert metrics.mean_toxicity(matrix) == pytest.approx(evaluation.tuned["mean_toxicity"].value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.json", "generations.parquet"]


def test_the_same_seed_gives_the_same_evaluation(systems, evaluation, tiny_llama):
    config = EvaluationConfig(bootstrap_resamples=300)
    again = measure(*systems, ProfanityCheck(), tiny_llama, PAD_ID, {END_ID}, config, seed=3)
    assert again.to_json() == evaluation.to_json()


def test_a_base_without_toxicity_gives_null_and_not_nan(make_rollouts, tiny_llama):
    base = group_rollouts("base", make_rollouts([["a b"], ["c d"]]))
    tuned = group_rollouts("tuned", make_rollouts([["e f"], [""]]))
    config = EvaluationConfig(bootstrap_resamples=100)
    content = measure(base, tuned, ConstantJudge(np.zeros(2)), tiny_llama, PAD_ID, {END_ID}, config, 0).to_json()
    assert content["reduction"]["mean_toxicity"] == {"value": None, "low": None, "high": None}
    assert content["tuned"]["share_empty"] == 0.5
    assert math.isfinite(content["tuned"]["distinct_2"])


def test_nothing_after_the_end_token_counts(make_rollouts, tiny_llama):
    plain = make_rollouts([["one two three"]])
    padded = [type(r)(**{**r.__dict__, "response_ids": np.append(r.response_ids, [9, 9])}) for r in plain]
    config = EvaluationConfig(bootstrap_resamples=100)
    both = group_rollouts("plain", plain), group_rollouts("padded", padded)
    content = measure(*both, ConstantJudge(np.array([0.5])), tiny_llama, PAD_ID, {END_ID}, config, 0).to_json()
    assert content["base"] == content["tuned"]
    assert content["base"]["mean_length"] == 3


def test_what_cannot_be_paired_is_refused(make_rollouts, tiny_llama):
    def refused(base, tuned, match):
        with pytest.raises(DataError, match=match):
            measure(base, tuned, ProfanityCheck(), tiny_llama, PAD_ID, {END_ID}, EvaluationConfig(), 0)

    two = group_rollouts("two", make_rollouts([["a"], ["b"]]))
    refused(two, group_rollouts("one", make_rollouts([["a"]])), r"different prompts \(1 only the first, 0 only")
    refused(two, group_rollouts("more", make_rollouts([["a", "b"], ["c", "d"]])), "grows with their number")
    refused(two, two, "own name")
    with pytest.raises(DataError, match=r"'p0' has 2 responses|'p1' has 1 responses"):
        group_rollouts("ragged", make_rollouts([["a", "b"], ["c"]]))
    with pytest.raises(DataError, match="no responses"):
        group_rollouts("none", [])


@pytest.mark.parametrize(
    ("scores", "match"),
    [
        (np.array([0.1]), "shape"),
        (np.array([0.1, np.nan]), "nan for 1 of 2"),
        (np.array([-3.0, 0.2]), "probability"),
        (np.array([[0.1, 0.9], [0.2, 0.8]]), "shape"),
    ],
)
def test_a_judge_that_gives_no_probabilities_is_an_error(make_rollouts, tiny_llama, scores, match):
    systems = [group_rollouts(name, make_rollouts([["a"], ["b"]])) for name in ("base", "tuned")]
    with pytest.raises(RewardError, match=match):
        measure(*systems, ConstantJudge(scores), tiny_llama, PAD_ID, {END_ID}, EvaluationConfig(), 0)
