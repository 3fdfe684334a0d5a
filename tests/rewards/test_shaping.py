import numpy as np
import pytest

from detox_ray.config import ExtraTerm, ShapingConfig
from detox_ray.errors import ConfigError, RewardError
from detox_ray.rewards.shaping import load_term, repeated_bigram_share, shape

pytestmark = pytest.mark.unit

RESPONSES = [np.array([], dtype=np.int64), np.array([7]), np.array([1, 2, 1, 2, 1]), np.arange(8)]
REASONS = ["stop", "stop", "length", "length"]


def test_terms_by_hand() -> None:
    config = ShapingConfig(min_tokens=4, short_penalty=2.0, repetition_penalty=3.0, unfinished_penalty=0.5)
    terms = shape(RESPONSES, REASONS, config)
    assert terms["short"] == pytest.approx([-2.0, -1.5, 0.0, 0.0])
    # Four bigrams (1 2, 2 1, 1 2, 2 1), two distinct: half of them repeat.
    assert terms["repetition"] == pytest.approx([0.0, 0.0, -1.5, 0.0])
    assert terms["unfinished"] == pytest.approx([0.0, 0.0, -0.5, -0.5])
    assert all(term.dtype == np.float32 for term in terms.values())


def test_nothing_is_penalised_by_default() -> None:
    terms = shape(RESPONSES, REASONS, ShapingConfig())
    assert set(terms) == {"short", "repetition", "unfinished"}
    for term in terms.values():
        np.testing.assert_array_equal(term, np.zeros(4))
        assert not np.signbit(term).any()


def test_share_of_repeated_bigrams() -> None:
    assert repeated_bigram_share(np.full(11, 5)) == pytest.approx(0.9)
    assert repeated_bigram_share(np.array([1, 2])) == 0.0


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="4 responses but 1"):
        shape(RESPONSES, ["stop"], ShapingConfig())


def count_sevens(response_ids: list[np.ndarray], finish_reasons: list[str]) -> np.ndarray:
    return np.array([(ids == 7).sum() for ids in response_ids])


def test_a_term_of_the_users_own() -> None:
    config = ShapingConfig(extra=[ExtraTerm(name="sevens", function=f"{__name__}:count_sevens", weight=-0.5)])
    terms = shape([np.array([7, 1, 7]), np.array([2])], ["stop", "stop"], config)
    assert terms["sevens"].tolist() == [-1.0, 0.0]
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_term(ExtraTerm(name="x", function="nowhere:at_all"))
    wrong = ShapingConfig(extra=[ExtraTerm(name="x", function=f"{__name__}:one_number")])
    with pytest.raises(RewardError, match="one finite number a response"):
        shape([np.array([1]), np.array([2])], ["stop", "stop"], wrong)


def one_number(response_ids: list[np.ndarray], finish_reasons: list[str]) -> float:
    return 0.0
