"""KL to the reference policy: the per-token estimate in the reward, and the coefficient's controller."""

from dataclasses import dataclass

import torch
from torch import Tensor

from detox_ray.ppo_config import KLConfig


def k1(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """[B, R]: log p(token) - log p_ref(token), the unbiased estimate whose sum is the response's log ratio.

    Source: Schulman, "Approximating KL divergence", 2020, k1.
    """
    return torch.where(mask, logprobs - reference, 0.0)


@dataclass
class KLController:
    """The KL coefficient beta; with `config.adaptive` it follows the measured KL (Ziegler et al. 2019, section 2.2)."""

    config: KLConfig
    coefficient: float

    def update(self, kl: float, responses: int) -> None:
        """Move beta after a step with mean `kl` (nats per response) over `responses` responses."""
        if not self.config.adaptive:
            return
        error = min(max(kl / self.config.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * responses / self.config.horizon
