"""The configuration of the learner's algorithm."""

from typing import Literal

from pydantic import Field

from detox_ray.config_section import Section


class KLConfig(Section):
    """The pull towards the reference policy, per token, in the reward."""

    coefficient: float = Field(0.05, ge=0, description="beta; with adaptive, where it starts")
    adaptive: bool = Field(False, description="move beta to hold the KL of a response at target (Ziegler et al. 2019)")
    target: float = Field(6.0, gt=0, description="nats per response, when adaptive")
    horizon: int = Field(10_000, ge=1, description="responses over which beta adapts, when adaptive")


class OptimizerConfig(Section):
    """How the adapter's weights are moved along their gradients."""

    learning_rate: float = Field(3e-4, gt=0, le=1, description="of the adapter")
    warmup_steps: int = Field(
        0, ge=0, description="steps over which the learning rates rise: 1/n of them at the first of n, all at the last"
    )
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="linear: rates fall all the way, to 1/n of them at the last of n steps"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw", description="8bit: moments of one byte; paged: on a GPU, moments may move to the host's memory"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled, times the learning rate (Loshchilov, Hutter 2019)")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")


class DivergenceConfig(Section):
    """When a step is rejected: the run goes back to the last good adapter, once, with lower learning rates."""

    max_kl_per_token: float = Field(
        3.0, gt=0, description="nats; a policy further from the reference writes what that would never write"
    )
    max_loss: float = Field(1e3, gt=0, description="of policy loss and value loss, mean a token")
    max_identical: float = Field(
        0.9, gt=0, le=1, description="share of a batch's responses that are one and the same text, say the empty one"
    )
    rate_factor: float = Field(0.3, gt=0, lt=1, description="what the learning rates are then multiplied by")


class PPOConfig(OptimizerConfig):
    """Proximal policy optimisation (Schulman et al. 2017)."""

    batch_size: int = Field(128, ge=2, description="responses per step, over all learner workers")
    epochs: int = Field(2, ge=1, description="passes over a batch")
    minibatches: int = Field(2, ge=1, description="optimiser steps a pass")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes an optimiser step is summed over")
    value_learning_rate: float = Field(1e-3, gt=0, le=1, description="of the value head, which starts from zero")
    estimator: Literal["gae", "rloo", "grpo"] = Field(
        "gae", description="of the advantage; only gae trains the value head"
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount a token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="0: one-step advantages; 1: whole returns (gae)")
    group_by_length: bool = Field(
        False, description="minibatches of rows of similar length, with less padding to compute, instead of any rows"
    )
    whiten_advantages: bool = Field(
        True, description="advantages of a batch have mean 0 and variance 1 over its tokens"
    )
    clip_range: float = Field(0.2, gt=0, lt=1, description="epsilon of the policy ratio")
    value_clip_range: float = Field(0.2, gt=0, description="epsilon of the value function")
    value_coefficient: float = Field(0.1, ge=0, description="weight of the value loss")
    entropy_coefficient: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    target_kl: float | None = Field(None, gt=0, description="stop a step's updates once approx_kl exceeds this")
    importance_cap: float = Field(2.0, ge=1, description="cap of the proximal / behaviour importance weight")
    kl: KLConfig = KLConfig()
    divergence: DivergenceConfig = DivergenceConfig()
