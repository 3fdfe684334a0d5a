import pytest

from detox_ray.evaluation.reward_hacking import reward_judge_gap

pytestmark = pytest.mark.unit


def lines(reward, toxicity):
    return [
        {"step": 10 * i, "reward": r, "mean_toxicity": t} for i, (r, t) in enumerate(zip(reward, toxicity, strict=True))
    ]


def test_steady_progress_of_both_is_no_hacking():
    found = reward_judge_gap(lines([-1.0 + 0.2 * i for i in range(9)], [0.5 - 0.05 * i for i in range(9)]))
    assert found.widens is False
    assert found.warning == ""
    assert found.gap == pytest.approx([0.0] * 9)


@pytest.mark.parametrize("late", [[0.26, 0.25, 0.25], [0.26, 0.3, 0.35]])
def test_a_reward_that_rises_while_the_judge_stalls_or_worsens(late):
    reward, toxicity = [0.1 * i for i in range(9)], [0.5, 0.46, 0.42, 0.38, 0.34, 0.3, *late]
    found = reward_judge_gap(lines(reward, toxicity))
    assert found.widens is True
    assert "since step 60" in found.warning


def test_a_reward_that_has_settled_too_is_no_hacking():
    reward = [0.0, 0.3, 0.6, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0]
    toxicity = [0.5, 0.4, 0.3, 0.2, 0.12, 0.1, 0.1, 0.1, 0.1]
    assert reward_judge_gap(lines(reward, toxicity)).widens is False


def test_an_early_gap_that_closes_is_no_hacking():
    reward = [0.1 * i for i in range(9)]
    toxicity = [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2]
    assert reward_judge_gap(lines(reward, toxicity)).widens is False


def test_a_judge_that_never_moves_while_the_reward_rises():
    assert reward_judge_gap(lines([0.1 * i for i in range(6)], [0.5] * 6)).widens is True


def test_gap_by_hand():
    found = reward_judge_gap(lines([1.0, 3.0, 2.0], [0.4, 0.5, 0.2]))
    assert found.steps == [0, 10, 20]
    assert found.reward == pytest.approx([0, 1, 0.5])
    assert found.judge == pytest.approx([0, -0.5, 1])
    assert found.gap == pytest.approx([0, 1.5, -0.5])
    assert found.widens is None


def test_lines_without_both_numbers_do_not_count():
    good = lines([0.1 * i for i in range(6)], [0.5] * 6)
    holes = [{"step": 99, "reward": None, "mean_toxicity": 0.1}, {"step": 98, "reward": float("nan")}, {"step": 97}]
    assert reward_judge_gap(good + holes) == reward_judge_gap(good)
    assert reward_judge_gap(good[:1] + holes) is None
    assert reward_judge_gap([]) is None
