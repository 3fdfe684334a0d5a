import pytest
import torch

from detox_ray.learner.advantages import gae, grpo, rloo, token_rewards, whiten

pytestmark = pytest.mark.unit


def random_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 4, 7, 3])
    mask = torch.arange(7)[None, :] < lengths[:, None]
    rewards = torch.where(mask, torch.randn(4, 7, generator=generator), 0.0)
    values = torch.where(mask, torch.randn(4, 7, generator=generator), 0.0)
    return rewards, values, mask


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_weighted_sum_of_temporal_differences(gamma: float, gae_lambda: float) -> None:
    rewards, values, mask = random_batch()
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    for row in range(len(rewards)):
        length = int(mask[row].sum())
        for t in range(length):
            expected = 0.0
            for k in range(t, length):
                following = values[row, k + 1].item() if k + 1 < length else 0.0
                delta = rewards[row, k].item() + gamma * following - values[row, k].item()
                expected += (gamma * gae_lambda) ** (k - t) * delta
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + values[row, t].item(), abs=1e-5)
        assert (advantages[row, length:] == 0).all()


def test_gae_by_hand() -> None:
    # Two tokens, reward 1 at the end, values .5 and .25: deltas -.25 and .75, so .75 and -.25 + .5 * .75 = .125.
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), mask, 1.0, 0.5)
    assert advantages.tolist() == [[0.125, 0.75]]
    assert returns.tolist() == [[0.625, 1.0]]


def test_gae_does_not_look_at_padding() -> None:
    rewards, values, mask = random_batch()
    expected, _ = gae(rewards, values, mask, 1.0, 0.95)
    noisy = torch.where(mask, values, 100.0)
    assert torch.equal(gae(rewards, noisy, mask, 1.0, 0.95)[0], expected)


def test_token_rewards_put_the_score_on_the_last_token() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    kl = torch.tensor([[0.1, 0.2, 9.0], [0.0, -0.1, 0.3]])
    result = token_rewards(torch.tensor([1.0, -1.0]), kl, mask, 0.5)
    assert torch.allclose(result, torch.tensor([[-0.05, 0.9, 0.0], [0.0, 0.05, -1.15]]))


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    assert torch.allclose(rloo(rewards), torch.tensor([[1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5]]))


def test_grpo_standardises_within_the_prompt() -> None:
    rewards = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    result = grpo(rewards)
    deviation = 2.0**0.5
    assert torch.allclose(result[0], torch.tensor([-1.0, 1.0]) / (deviation + 1e-4))
    assert (result[1] == 0).all()


def test_standardised_advantages_have_mean_0_and_variance_1_over_tokens() -> None:
    advantages, _, mask = random_batch(3)
    tokens = advantages[mask]
    result = whiten(advantages, mask, mask.sum().float(), tokens.sum(), (tokens**2).sum())
    assert result[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert result[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert (result[~mask] == 0).all()
