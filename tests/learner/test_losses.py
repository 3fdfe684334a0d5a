import math

import pytest
import torch

from detox_ray.learner.kl import KLController, k1
from detox_ray.learner.losses import explained_variance, importance_weights, moments, policy_loss, value_loss
from detox_ray.ppo_config import KLConfig

pytestmark = pytest.mark.unit

MASK = torch.tensor([[True, True, True], [True, False, False]])


def random_tensor(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))


def test_policy_loss_equals_a_loop_over_tokens() -> None:
    logprobs, proximal, advantages = random_tensor(0) * 0.5, random_tensor(1) * 0.5, random_tensor(2)
    importance = random_tensor(3).exp()
    result = policy_loss(logprobs, proximal, advantages, importance, MASK, 0.2)
    loss, clipped, kl = 0.0, 0, 0.0
    for row, column in MASK.nonzero().tolist():
        difference = (logprobs - proximal)[row, column].item()
        ratio, advantage = math.exp(difference), advantages[row, column].item()
        bounded = min(max(ratio, 0.8), 1.2)
        loss -= importance[row, column].item() * min(ratio * advantage, bounded * advantage)
        clipped += abs(ratio - 1) > 0.2
        kl += math.exp(difference) - 1 - difference
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert result.clipped.item() == clipped
    assert result.approx_kl.item() == pytest.approx(kl, rel=1e-4)


def test_clipping_stops_the_gradient_only_where_it_would_go_too_far() -> None:
    proximal = torch.zeros(1, 4)
    logprobs = torch.tensor([[0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    policy_loss(logprobs, proximal, advantages, torch.ones(1, 4), mask, 0.2).loss.backward()
    assert logprobs.grad is not None
    stopped = (logprobs.grad == 0).tolist()[0]
    assert stopped == [True, True, False, False]


def test_padding_has_no_loss_and_no_gradient() -> None:
    logprobs = random_tensor(0).requires_grad_()
    values = random_tensor(1).requires_grad_()
    ones = torch.ones(2, 3)
    loss = policy_loss(logprobs, random_tensor(2), ones, ones, MASK, 0.2).loss
    (loss + value_loss(values, random_tensor(3), random_tensor(4), MASK, 0.2)).backward()
    assert logprobs.grad is not None
    assert values.grad is not None
    assert (logprobs.grad[~MASK] == 0).all()
    assert (values.grad[~MASK] == 0).all()
    assert (logprobs.grad[0] != 0).any()


def test_value_loss_equals_a_loop_over_tokens() -> None:
    values, old, returns = random_tensor(0), random_tensor(1), random_tensor(2)
    expected = 0.0
    for row, column in MASK.nonzero().tolist():
        value, before, target = (x[row, column].item() for x in (values, old, returns))
        bounded = before + min(max(value - before, -0.2), 0.2)
        expected += 0.5 * max((value - target) ** 2, (bounded - target) ** 2)
    assert value_loss(values, old, returns, MASK, 0.2).item() == pytest.approx(expected, rel=1e-5)


def test_importance_weights_are_truncated() -> None:
    proximal = torch.tensor([[math.log(0.6), math.log(0.1), 0.0]])
    behaviour = torch.tensor([[math.log(0.2), math.log(0.2), -5.0]])
    mask = torch.tensor([[True, True, False]])
    assert torch.allclose(importance_weights(proximal, behaviour, mask, 2.0), torch.tensor([[2.0, 0.5, 0.0]]))


def test_k1_sums_to_the_log_ratio_of_the_response() -> None:
    logprobs, reference = random_tensor(0), random_tensor(1)
    expected = [(logprobs - reference)[0].sum().item(), (logprobs - reference)[1, 0].item()]
    assert k1(logprobs, reference, MASK).sum(dim=1).tolist() == pytest.approx(expected)


def test_adaptive_coefficient_follows_the_kl_and_is_bounded() -> None:
    controller = KLController(KLConfig(coefficient=0.1, adaptive=True, target=5.0, horizon=1000), 0.1)
    controller.update(kl=50.0, responses=100)
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    controller.update(kl=4.75, responses=100)
    assert controller.coefficient == pytest.approx(0.1 * 1.02 * (1 - 0.05 * 0.1))
    fixed = KLController(KLConfig(coefficient=0.1), 0.1)
    fixed.update(kl=50.0, responses=100)
    assert fixed.coefficient == 0.1


def test_explained_variance() -> None:
    returns = random_tensor(0)
    values = random_tensor(1)
    expected = 1 - (returns - values)[MASK].var() / returns[MASK].var()
    assert explained_variance(*moments(values, returns, MASK)) == pytest.approx(expected.item(), rel=1e-5)
    assert explained_variance(*moments(returns, returns, MASK)) == pytest.approx(1.0)
    assert explained_variance(*moments(torch.zeros(2, 3), returns, MASK)) == pytest.approx(0.0)
    assert explained_variance(*moments(returns, torch.ones(2, 3), MASK)) == 0.0
