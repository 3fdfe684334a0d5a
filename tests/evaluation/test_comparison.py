import json
import math
from dataclasses import replace

import numpy as np
import pytest
from profanity_check import predict_prob
from scipy.stats import spearmanr

from detox_ray.errors import DataError, RewardError
from detox_ray.evaluation.comparison import EvaluationProtocol, compare, write_evaluation
from detox_ray.evaluation.meter import PerplexityModel, checked_toxicity, score_responses
from detox_ray.evaluation.perplexity import response_nll
from detox_ray.evaluation.responses import align, group_rollouts, read_generations, systems_of
from detox_ray.records import Prompt

pytestmark = pytest.mark.unit

PAD_ID, END_ID = 0, 1
RUDE = ["you are a stupid idiot", "what a dumb stupid question", "shut up you moron", "only an idiot would ask that"]
CIVIL = ["thank you for asking that", "let us look at it together", "that is a good question", "here is what i know"]
# Published toxicity of the 12 prompts: four toxic, seven not, one without a score; the last is challenging.
PUBLISHED = [0.9, 0.5, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4, 0.49, 0.0, 0.05, None]
PROMPTS = [
    Prompt(f"p{i}", f"prompt number {i}", (5, 6, 7 + i), {"toxicity": PUBLISHED[i], "challenging": i == 11})
    for i in range(12)
]
PROTOCOL = EvaluationProtocol(["alt-profanity-check", "length"], seed=3, resamples=300, perplexity_model="tiny")
TOXICITY = ("mean_toxicity", "share_toxic", "expected_maximum_toxicity", "toxicity_probability")


def judged(text: str) -> float:
    """A text without a visible character is not toxic."""
    return float(predict_prob([text])[0]) if text else 0.0


class ProfanityCheck:
    name = "alt-profanity-check"

    def toxicity(self, texts):
        return np.asarray(predict_prob(texts))


class Length:
    name = "length"

    def toxicity(self, texts):
        return np.array([min(1.0, len(text) / 40) for text in texts])


class Zero:
    name = "zero"

    def toxicity(self, texts):
        return np.zeros(len(texts))


class Constant:
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
    return align(
        [
            group_rollouts("base", make_rollouts(base), PROMPTS, [END_ID]),
            group_rollouts("tuned", list(reversed(make_rollouts(tuned, version=7))), PROMPTS, [END_ID]),
        ]
    )


@pytest.fixture(scope="module")
def scored(systems, tiny_llama):
    model = PerplexityModel(tiny_llama, PAD_ID)
    return [score_responses(system, [ProfanityCheck(), Length()], model) for system in systems]


@pytest.fixture(scope="module")
def evaluation(scored):
    return json.loads(json.dumps(compare(scored, PROTOCOL), allow_nan=False))


def test_metrics_of_every_system_against_direct_loops(systems, evaluation, tiny_llama):
    for system in systems:
        metrics = {name: i["value"] for name, i in evaluation["systems"][system.name]["all"].items()}
        toxicity = [[judged(r.text) for r in samples] for samples in system.rollouts]
        flat = [t for samples in toxicity for t in samples]
        texts = [r.text for r in system.flat]
        assert metrics["mean_toxicity"] == pytest.approx(sum(flat) / 48)
        assert metrics["std_toxicity"] == pytest.approx(np.std(flat))
        assert metrics["share_toxic"] == pytest.approx(sum(t >= 0.5 for t in flat) / 48)
        assert metrics["expected_maximum_toxicity"] == pytest.approx(sum(max(s) for s in toxicity) / 12)
        assert metrics["toxicity_probability"] == pytest.approx(sum(max(s) >= 0.5 for s in toxicity) / 12)
        assert metrics["share_high"] == pytest.approx(sum(t > 0.66 for t in flat) / 48)
        assert metrics["mean_length"] == pytest.approx(sum(len(t.split()) for t in texts) / 48)
        assert metrics["share_empty"] == pytest.approx(sum(not t for t in texts) / 48)
        assert metrics["share_refusal"] == 0
        ids = [r.response_ids for r in system.flat]
        nll, tokens = response_nll(tiny_llama, [r.prompt_ids for r in system.flat], ids, 16, PAD_ID)
        assert metrics["perplexity"] == pytest.approx(math.exp(nll.sum() / tokens.sum()), rel=1e-5)
        for interval in evaluation["systems"][system.name]["all"].values():
            assert interval["low"] - 1e-9 <= interval["value"] <= interval["high"] + 1e-9


def test_comparison_is_of_the_two_values_and_reliable_here(evaluation):
    base, tuned = (evaluation["systems"][name]["all"] for name in ("base", "tuned"))
    change = evaluation["comparisons"]["tuned"]["all"]
    for name in TOXICITY:
        assert change["reduction"][name]["value"] == pytest.approx(1 - tuned[name]["value"] / base[name]["value"])
    for name in ("perplexity", "mean_length", "distinct_2"):
        assert change["ratio"][name]["value"] == pytest.approx(tuned[name]["value"] / base[name]["value"])
    assert change["reduction"]["mean_toxicity"]["low"] > 0.3
    assert change["p_value"] < 0.02


def test_splits_are_those_of_the_published_scores(evaluation, systems):
    assert evaluation["splits"] == {"all": 12, "toxic": 4, "nontoxic": 7, "challenging": 1}
    toxicity = [judged(r.text) for samples in systems[0].rollouts[:4] for r in samples]
    assert evaluation["systems"]["base"]["toxic"]["mean_toxicity"]["value"] == pytest.approx(np.mean(toxicity))
    assert evaluation["by_scorer"]["alt-profanity-check"]["base"]["toxic"]["mean_toxicity"]["value"] == pytest.approx(
        np.mean(toxicity)
    )


def test_short_form_and_what_was_measured(evaluation):
    assert evaluation["base"]["mean_toxicity"] == evaluation["systems"]["base"]["all"]["mean_toxicity"]["value"]
    assert evaluation["tuned"]["distinct_2"] == evaluation["systems"]["tuned"]["all"]["distinct_2"]["value"]
    assert evaluation["reduction"].keys() == set(TOXICITY)
    assert evaluation["ratio"].keys() == {"perplexity", "distinct_2", "mean_length"}
    assert (evaluation["format"], evaluation["judge"], evaluation["reference"]) == (2, "alt-profanity-check", "base")
    assert (evaluation["prompts"], evaluation["samples_per_prompt"], evaluation["seed"]) == (12, 4, 3)
    assert (evaluation["threshold"], evaluation["perplexity_model"]) == (0.5, "tiny")
    assert "torch" in evaluation["versions"]


def test_agreement_is_spearmans(evaluation, scored):
    both = [np.concatenate([s.toxicity[name].ravel() for s in scored]) for name in PROTOCOL.scorers]
    expected = spearmanr(*both).statistic
    assert evaluation["agreement"]["alt-profanity-check"]["length"] == pytest.approx(expected)
    assert evaluation["agreement"]["length"]["length"] == pytest.approx(1)


def test_files_hold_every_response_and_give_the_same_evaluation_again(scored, evaluation, tmp_path):
    write_evaluation(tmp_path, compare(scored, PROTOCOL), scored)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation
    table = read_generations(tmp_path / "generations.parquet")
    rows = table.to_pylist()
    assert len(rows) == 96
    for row in rows:
        assert row["adapter_version"] == (7 if row["system"] == "tuned" else 0)
        assert row["tokens"] == len(row["response_ids"]) == len(row["response"].split())
        assert row["toxicity"] == row["toxicity/alt-profanity-check"] == pytest.approx(judged(row["response"]))
        assert row["prompt_toxicity"] == PUBLISHED[int(row["prompt_id"][1:])]
        assert (row["nll"] > 0) == (row["tokens"] > 0)
    # Prompts come back in another order, so random resamples differ; what is not random does not.
    again = compare(systems_of(table), PROTOCOL)
    for system in ("base", "tuned"):
        for metric, interval in again["systems"][system]["all"].items():
            assert interval["value"] == pytest.approx(evaluation["systems"][system]["all"][metric]["value"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.json", "generations.parquet"]


def test_one_system_and_three(scored):
    alone = compare(scored[:1], PROTOCOL)
    assert alone["comparisons"] == {}
    assert "reduction" not in alone
    third = replace(scored[1], responses=replace(scored[1].responses, name="third"))
    three = compare([*scored, third], PROTOCOL)
    assert list(three["systems"]) == ["base", "tuned", "third"]
    assert three["comparisons"]["third"]["all"] == three["comparisons"]["tuned"]["all"]
    assert "reduction" not in three


def test_a_base_without_toxicity_gives_null_and_not_nan(make_rollouts):
    systems = [
        group_rollouts(name, make_rollouts(texts), PROMPTS, [END_ID])
        for name, texts in (("base", [["a b"], ["c d"]]), ("tuned", [["e f"], [""]]))
    ]
    scored = [score_responses(system, [Zero()], None) for system in systems]
    content = compare(scored, EvaluationProtocol(["zero"], 0, 100))
    json.dumps(content, allow_nan=False)
    assert content["reduction"]["mean_toxicity"] == {"value": None, "low": None, "high": None}
    assert content["tuned"]["share_empty"] == 0.5
    assert "perplexity" not in content["tuned"]


def test_repetition_by_hand(make_rollouts):
    """Four bigrams, two of them new; one token has none."""
    system = group_rollouts("base", make_rollouts([["one two one two one"], ["seven"]]), PROMPTS, [END_ID])
    content = compare([score_responses(system, [Zero()], None)], EvaluationProtocol(["zero"], 0, 100))
    assert content["systems"]["base"]["all"]["repetition"]["value"] == pytest.approx((0.5 + 0) / 2)


def test_nothing_after_the_end_token_counts(make_rollouts):
    plain = make_rollouts([["one two three"]])
    padded = [replace(r, response_ids=np.append(r.response_ids, [9, 9])) for r in plain]
    both = [group_rollouts("", rollouts, PROMPTS, [END_ID]).flat[0] for rollouts in (plain, padded)]
    assert both[0].response_ids.tolist() == both[1].response_ids.tolist()
    assert len(both[0].response_ids) == 3


def test_what_cannot_be_paired_is_refused(make_rollouts):
    def group(name, texts):
        return group_rollouts(name, make_rollouts(texts), PROMPTS, [END_ID])

    two = group("two", [["a"], ["b"]])
    with pytest.raises(DataError, match=r"different prompts \(1 only the first, 0 only"):
        align([two, group("one", [["a"]])])
    with pytest.raises(DataError, match="grows with their number"):
        align([two, group("more", [["a", "b"], ["c", "d"]])])
    with pytest.raises(DataError, match="own name"):
        align([two, two])
    with pytest.raises(DataError, match=r"'p0' has 2 responses|'p1' has 1 responses"):
        group("ragged", [["a", "b"], ["c"]])
    with pytest.raises(DataError, match="no responses"):
        group_rollouts("none", [], PROMPTS)


def test_what_is_known_of_a_prompt_is_taken_from_whichever_system_has_it(make_rollouts):
    bare = [Prompt(p.id, p.text, p.token_ids, {"toxicity": None, "group": f"g{i}"}) for i, p in enumerate(PROMPTS[:2])]
    texts = [["a"], ["b"]]
    systems = [
        group_rollouts(name, make_rollouts(texts), prompts, [END_ID])
        for name, prompts in (("file", bare), ("model", list(reversed(PROMPTS[:2]))))
    ]
    for system in align(systems):
        assert [prompt.meta["toxicity"] for prompt in system.prompts] == PUBLISHED[:2]
        assert [prompt.meta["group"] for prompt in system.prompts] == ["g0", "g1"]
    scored = [score_responses(system, [Zero()], None) for system in align(systems)]
    assert compare(scored, EvaluationProtocol(["zero"], 0, 100))["splits"] == {"all": 2, "toxic": 2}


def test_empty_responses_alone_are_not_toxic():
    assert checked_toxicity(ProfanityCheck(), ["", " \n"]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("scores", "match"),
    [
        (np.array([0.1]), "shape"),
        (np.array([0.1, np.nan]), "nan for 1 of 2"),
        (np.array([-3.0, 0.2]), "probability"),
        (np.array([[0.1, 0.9], [0.2, 0.8]]), "shape"),
    ],
)
def test_a_scorer_that_gives_no_probabilities_is_an_error(scores, match):
    with pytest.raises(RewardError, match=match):
        checked_toxicity(Constant(scores), ["a", "b"])


def test_a_text_is_scored_once_however_often_it_was_said():
    asked = []

    class Counting:
        name = "counting"

        def toxicity(self, texts):
            asked.extend(texts)
            return np.linspace(0.5, 1, len(texts))

    assert checked_toxicity(Counting(), ["a", "b", "", "a", " "]).tolist() == [0.5, 1, 0, 0.5, 0]
    assert asked == ["a", "b"]


def test_another_models_perplexity_reads_its_own_tokens(make_rollouts, tiny_llama):
    class Words:
        bos_token_id = eos_token_id = None

        def __call__(self, texts, **_):
            return {"input_ids": [[2 + len(word) for word in text.split()] for text in texts]}

    system = group_rollouts("base", make_rollouts([["one three", "four"]]), PROMPTS, [END_ID])
    nll, tokens = PerplexityModel(tiny_llama, PAD_ID, Words()).nll(system)
    expected, counts = response_nll(tiny_llama, [[8, 8, 3]] * 2, [[5, 7], [6]], 2, PAD_ID)
    assert nll.tolist() == [pytest.approx(expected.tolist())]
    assert tokens.tolist() == [counts.tolist()]


def test_systems_without_common_tokens_are_counted_in_words(scored):
    counted = replace(PROTOCOL, counted_in="words")
    by_words, by_tokens = (compare(scored, protocol)["systems"] for protocol in (counted, PROTOCOL))
    for system in scored:
        words = [len(rollout.text.split()) for rollout in system.responses.flat]
        assert by_words[system.name]["all"]["mean_length"]["value"] == pytest.approx(np.mean(words))
        assert by_words[system.name]["all"]["perplexity"] == by_tokens[system.name]["all"]["perplexity"]
