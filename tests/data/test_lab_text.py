import itertools
import random

import numpy as np
import pytest

from detox_ray.data.lab_text import exchanges

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def sample():
    return exchanges(7, 6000)


def test_the_same_seed_gives_the_same_exchanges_and_another_seed_others(sample):
    assert exchanges(7, 500) == sample[:500]
    assert not {e.prompt for e in exchanges(8, 200)} & {e.prompt for e in sample[:200]}


def test_the_global_random_state_is_left_alone():
    state = random.getstate()
    exchanges(0, 10)
    assert random.getstate() == state


def test_prompts_are_distinct_and_excluded_ones_do_not_occur(sample):
    prompts = {e.prompt for e in sample}
    assert len(prompts) == len(sample)
    assert not prompts & {e.prompt for e in exchanges(7, 500, exclude=frozenset(prompts))}


def test_no_slot_is_left_unfilled_and_the_parts_join_with_a_space(sample):
    for e in sample:
        assert "{" not in e.prompt + e.response
        assert e.prompt.endswith(":")
        assert e.response.startswith(" ")
        assert e.response[-1] in ".?"


def test_half_of_the_responses_are_rude_whatever_the_prompt_is_like(sample):
    rude = np.array([e.rude for e in sample])
    impolite = np.array(["idiot" in e.prompt or "stupid" in e.prompt or "fool" in e.prompt for e in sample])
    assert impolite.sum() > 300
    assert rude.mean() == pytest.approx(0.5, abs=0.03)
    assert rude[impolite].mean() == pytest.approx(0.5, abs=0.08)


def test_the_independent_judge_separates_rude_from_civil(sample):
    from profanity_check import predict_prob

    toxicity = predict_prob([e.response for e in sample])
    rude = np.array([e.rude for e in sample])
    assert toxicity[rude].mean() >= 0.95
    assert toxicity[~rude].mean() <= 0.03
    assert (toxicity[rude] >= 0.5).all()
    assert (toxicity[~rude] < 0.25).all()


def test_civil_responses_are_as_long_and_as_varied_as_rude_ones(sample):
    civil = [e.response.split() for e in sample if not e.rude]
    rude = [e.response.split() for e in sample if e.rude]

    def distinct_bigrams(responses):
        groups = [responses[i : i + 4] for i in range(0, len(responses) - 3, 4)]
        bigrams = [[pair for words in group for pair in itertools.pairwise(words)] for group in groups]
        return np.mean([len(set(pairs)) / len(pairs) for pairs in bigrams])

    assert np.mean([len(w) for w in civil]) >= 0.95 * np.mean([len(w) for w in rude])
    assert distinct_bigrams(civil) >= distinct_bigrams(rude)
