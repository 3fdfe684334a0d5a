import pytest
import torch
from torch import nn

from detox_ray.policy.tokens import token_logprobs

pytestmark = pytest.mark.unit


def problem(rows: int = 37) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 16), nn.Linear(16, 50), torch.randint(0, 50, (rows,))


@pytest.mark.parametrize("max_logits", [10**9, 50 * 5, 1])
def test_chunks_change_neither_values_nor_gradients(max_logits: int) -> None:
    hidden, head, targets = problem()
    hidden.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, head, targets, entropy="gradient", max_logits=max_logits)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()
    gradients = [hidden.grad, head.weight.grad]

    again = hidden.detach().requires_grad_()
    head.zero_grad()
    distribution = torch.distributions.Categorical(logits=head(again))
    (distribution.log_prob(targets).sum() + 0.1 * distribution.entropy().sum()).backward()
    assert torch.allclose(logprobs, distribution.log_prob(targets), atol=1e-5)
    assert torch.allclose(entropy, distribution.entropy(), atol=1e-5)
    for found, expected in zip(gradients, [again.grad, head.weight.grad], strict=True):
        assert found is not None
        assert expected is not None
        assert torch.allclose(found, expected, atol=1e-4)


def test_temperature_and_suppressed_tokens_define_the_distribution() -> None:
    hidden, head, _ = problem(3)
    targets = torch.tensor([4, 5, 6])
    logprobs, _ = token_logprobs(hidden, head, targets, temperature=0.7, suppressed=torch.tensor([0, 9]))
    logits = head(hidden) / 0.7
    logits[:, [0, 9]] = -torch.inf
    assert torch.allclose(logprobs, logits.log_softmax(1)[[0, 1, 2], targets], atol=1e-5)


def test_never_more_than_a_chunk_of_logits_is_alive() -> None:
    hidden, head, targets = problem(100)
    sizes: list[int] = []

    class Watched(nn.Module):
        out_features = 50

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.shape[0] * 50)
            return head(x)

    token_logprobs(hidden.requires_grad_(), Watched(), targets, max_logits=700)[0].sum().backward()
    assert max(sizes) <= 700


def test_no_tokens() -> None:
    hidden, head, targets = problem(0)
    logprobs, entropy = token_logprobs(hidden, head, targets)
    assert logprobs.shape == entropy.shape == (0,)
