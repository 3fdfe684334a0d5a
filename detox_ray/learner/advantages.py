"""Advantage estimators. Pure tensors; `mask` is true where there is a token, and masked entries come out as zero."""

import torch
from torch import Tensor


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """[B, R]: minus the KL penalty at every token, and the response's reward at its last (Ziegler et al. 2019, eq. 2).

    Args:
        rewards: [B] float32, of whole responses.
        kl: [B, R] float32, per-token estimate against the reference.
        mask: [B, R] bool; every response has at least one token.
        kl_coefficient: beta.
    """
    last = mask.sum(dim=1) - 1
    per_token = torch.where(mask, -kl_coefficient * kl, 0.0)
    per_token[torch.arange(len(rewards), device=rewards.device), last] += rewards
    return per_token


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16); the value after the last token is 0.

    Args:
        rewards: [B, R] float32.
        values: [B, R] float32.
        mask: [B, R] bool.
        gamma: discount per token.
        gae_lambda: weight of longer returns.

    Returns:
        advantages [B, R], returns = advantages + values [B, R].
    """
    advantages = torch.zeros_like(rewards)
    following_advantage = rewards.new_zeros(len(rewards))
    following_value = rewards.new_zeros(len(rewards))
    values = torch.where(mask, values, 0.0)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * following_advantage, 0.0)
        advantages[:, t] = advantage
        following_advantage, following_value = advantage, values[:, t]
    return advantages, advantages + values


def rloo(rewards: Tensor) -> Tensor:
    """Reward minus the mean of the other responses to the same prompt (Ahmadian et al. 2024, eq. 8).

    Args:
        rewards: [P, S] float32, S >= 2 responses to each of P prompts.

    Returns:
        [P, S] advantages.
    """
    samples = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (samples / (samples - 1))


def grpo(rewards: Tensor) -> Tensor:
    """Rewards standardised among the responses to the same prompt (Shao et al. 2024, section 4.1.2).

    Args:
        rewards: [P, S] float32, S >= 2 responses to each of P prompts.

    Returns:
        [P, S] advantages; zero where all responses to a prompt have one reward.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)


def whiten(advantages: Tensor, mask: Tensor, count: Tensor, total: Tensor, total_square: Tensor) -> Tensor:
    """Advantages with mean 0 and variance 1 over all tokens.

    Args:
        advantages: [B, R] float32.
        mask: [B, R] bool.
        count: [] number of tokens, over all learners.
        total: [] their sum.
        total_square: [] sum of their squares.
    """
    mean = total / count
    variance = (total_square / count - mean**2).clamp(min=0)
    return torch.where(mask, (advantages - mean) * torch.rsqrt(variance + 1e-8), 0.0)
