"""The clipped losses of PPO. Pure tensors; every loss is a sum over tokens, to be divided by the number of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over tokens: the loss (with gradient), how many ratios were clipped, and the KL from the proximal policy."""

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor


def policy_loss(
    logprobs: Tensor, proximal: Tensor, advantages: Tensor, importance: Tensor, mask: Tensor, clip_range: float
) -> PolicyLoss:
    """Clipped surrogate objective (Schulman et al. 2017, eq. 7) with truncated importance weights.

    Args:
        logprobs: [B, R] float32 of the policy being trained.
        proximal: [B, R] float32 of the policy at the start of the update; the ratio is taken to it.
        advantages: [B, R] float32.
        importance: [B, R] float32, min(cap, exp(proximal - behaviour)).
        mask: [B, R] bool.
        clip_range: epsilon.
    """
    log_ratio = torch.where(mask, logprobs - proximal, 0.0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    per_token = -importance * torch.minimum(unclipped, clipped)
    with torch.no_grad():
        # k3 of Schulman's "Approximating KL divergence", of tokens that the proximal policy sampled: unbiased, never
        # negative.
        approx_kl = torch.where(mask, ratio - 1 - log_ratio, 0.0).sum()
        clip_count = (mask & ((ratio - 1).abs() > clip_range)).sum()
    return PolicyLoss(torch.where(mask, per_token, 0.0).sum(), clip_count, approx_kl)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> Tensor:
    """Half the clipped squared error, summed over tokens; not in the paper, but in its authors' code (Baselines' ppo2).

    Args:
        values: [B, R] float32 of the value function being trained.
        old_values: [B, R] float32 at the start of the update.
        returns: [B, R] float32.
        mask: [B, R] bool.
        clip_range: values move at most this far from `old_values`.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * torch.where(mask, error, 0.0).sum()


def importance_weights(proximal: Tensor, behaviour: Tensor, mask: Tensor, cap: float) -> Tensor:
    """[B, R]: min(cap, p_proximal / p_behaviour), which is 1 where engine and learner agree; masked entries are 0.

    Args:
        proximal: [B, R] float32, log-probabilities by the learner.
        behaviour: [B, R] float32, log-probabilities the tokens were sampled with.
        mask: [B, R] bool.
        cap: truncation (Ionides 2008).
    """
    return torch.where(mask, (proximal - behaviour).exp().clamp(max=cap), 0.0)


def moments(values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Number of tokens and the sums over them that `explained_variance` takes; they add up over learners."""
    target = returns[mask].double()
    error = target - values[mask].double()
    return mask.sum(), target.sum(), (target**2).sum(), error.sum(), (error**2).sum()


def explained_variance(count: Tensor, total: Tensor, square: Tensor, error: Tensor, error_square: Tensor) -> float:
    """1 - var(returns - values) / var(returns) over all tokens: 1 is perfect, 0 no better than a constant."""
    variance = square / count - (total / count) ** 2
    if not variance > 1e-12:
        return 0.0
    return float(1 - (error_square / count - (error / count) ** 2) / variance)
