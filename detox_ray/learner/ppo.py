"""One PPO step: make experience of the rollouts, then run epochs of minibatches. Schulman et al. 2017."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detox_ray.errors import DivergenceError, SyncError
from detox_ray.learner.advantages import gae, grpo, rloo, token_rewards, whiten
from detox_ray.learner.distributed import learner_count, max_over_learners, seed_step, sum_gradients, sum_over_learners
from detox_ray.learner.kl import KLController, k1
from detox_ray.learner.losses import explained_variance, importance_weights, moments, policy_loss, value_loss
from detox_ray.learner.optimizer import make_optimizer, schedule_factor
from detox_ray.policy.policy import Policy, PolicyOutput
from detox_ray.policy.sequences import Sequences, collate
from detox_ray.ppo_config import PPOConfig
from detox_ray.records import Rollout


@dataclass(frozen=True)
class SamplingDistribution:
    """How the rollouts were sampled, as far as it defines the distribution, and how far it may be from the learner's.

    `suppressed` are tokens that could not be sampled; `max_logprob_gap` bounds the mean |behaviour - learner| of an
    on-policy batch, in nats.
    """

    temperature: float
    suppressed: tuple[int, ...]
    samples_per_prompt: int
    max_logprob_gap: float


@dataclass(frozen=True)
class Experience:
    """A batch ready for the epochs; all tensors [B, R] float32 but `mask` (bool)."""

    sequences: Sequences
    mask: Tensor
    proximal: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    importance: Tensor

    def rows(self, index: Tensor) -> "Experience":
        """The rows in `index`, cut to their longest response."""
        sequences = self.sequences.rows(index)
        longest = int(sequences.response_lengths.max())
        names = ("mask", "proximal", "values", "advantages", "returns", "importance")
        return Experience(sequences, *(getattr(self, name)[index, :longest] for name in names))


class PPO:
    """The learner: policy, optimiser and KL controller."""

    def __init__(
        self,
        policy: Policy,
        config: PPOConfig,
        distribution: SamplingDistribution,
        pad_id: int,
        total_steps: int,
        seed: int,
    ) -> None:
        self.policy = policy
        self.config = config
        self.kl_controller = KLController(config.kl, config.kl.coefficient)
        self.rate_scale = 1.0  # of the learning rates, below 1 after a roll-back
        self.optimizer = make_optimizer(
            [
                {"params": policy.adapter_parameters(), "lr": config.learning_rate},
                {"params": list(policy.value_head.parameters()), "lr": config.value_learning_rate},
            ],
            config,
        )
        self._distribution = distribution
        self._pad_id = pad_id
        self._total_steps = total_steps
        self._seed = seed
        self._device = policy.value_head.weight.device
        suppressed = distribution.suppressed
        self._suppressed = torch.tensor(suppressed, device=self._device) if suppressed else None

    def update(self, rollouts: Sequence[Rollout], rewards: np.ndarray, step: int, on_policy: bool) -> dict[str, float]:
        """Train on this learner's share of a batch.

        Args:
            rollouts: B, the samples of a prompt next to each other.
            rewards: [B] float32, higher is better.
            step: decides learning rate and shuffling, so that a resumed run repeats what it would have done.
            on_policy: the rollouts come from the policy as it is now, so engine and learner must agree on them.

        Returns:
            Metrics of `metric_names.TRAINING`, over all learners. policy_loss, value_loss, clip_fraction and grad_norm
            are means over the optimiser steps; approx_kl is of the last minibatch, before its optimiser step; all
            others are of the whole batch.

        Raises:
            SyncError: the mean log-probability gap of an on-policy batch is above the bound.
            DivergenceError: a bound of `ppo.divergence` is passed, or a log-probability is not finite; the weights may
                have changed.
        """
        seed_step(self._seed, step)
        self._set_learning_rate(step)
        experience, metrics = self._make_experience(rollouts, rewards, on_policy)
        metrics |= self._train(experience, step)
        metrics["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.kl_controller.update(metrics["kl"], responses=len(rollouts) * learner_count())
        return metrics

    def _make_experience(
        self, rollouts: Sequence[Rollout], rewards: np.ndarray, on_policy: bool
    ) -> tuple[Experience, dict[str, float]]:
        """Proximal and reference log-probabilities, values, KL and advantages of a batch."""
        sequences = collate(
            [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], self._pad_id, self._device
        )
        mask = sequences.response_mask()
        behaviour = torch.zeros(mask.shape, device=self._device)
        behaviour[mask] = torch.from_numpy(np.concatenate([r.logprobs for r in rollouts])).to(self._device)
        current = self._forward_without_gradient(sequences, reference=False)
        reference = self._forward_without_gradient(sequences, reference=True)
        gaps = self._logprob_gaps(current.logprobs, behaviour, mask, on_policy)
        importance = importance_weights(current.logprobs, behaviour, mask, self.config.importance_cap)
        kl = k1(current.logprobs, reference.logprobs, mask)

        responses, tokens, kl_sum, entropy_sum, weight_sum, weight_square_sum, capped = sum_over_learners(
            len(rollouts),
            mask.sum(),
            kl.sum(),
            current.entropy.sum(),
            importance.sum(),
            (importance**2).sum(),
            (importance >= self.config.importance_cap).sum(),
        )
        max_kl = self.config.divergence.max_kl_per_token
        if not kl_sum / tokens <= max_kl:
            raise DivergenceError(
                f"the policy is {float(kl_sum / tokens):.3g} nats per token from the reference "
                f"(ppo.divergence.max_kl_per_token={max_kl:g})"
            )
        reward = torch.from_numpy(rewards).float().to(self._device)
        advantages, returns = self._advantages(reward, kl, current.values, mask)
        metrics: dict[str, Any] = {
            "kl": kl_sum / responses,
            "kl_coefficient": self.kl_controller.coefficient,
            "entropy": entropy_sum / tokens,
            "importance_mean": weight_sum / tokens,
            "importance_ess": weight_sum**2 / (weight_square_sum * tokens),
            "importance_capped": capped / tokens,
            "response_length": tokens / responses,
            "explained_variance": explained_variance(*sum_over_learners(*moments(current.values, returns, mask))),
        }
        experience = Experience(sequences, mask, current.logprobs, current.values, advantages, returns, importance)
        return experience, gaps | {name: float(value) for name, value in metrics.items()}

    def _logprob_gaps(self, current: Tensor, behaviour: Tensor, mask: Tensor, on_policy: bool) -> dict[str, float]:
        """|behaviour - learner| over the sampled tokens: `logprob_gap_mean` and `logprob_gap_max`, in nats.

        Raises:
            DivergenceError: a log-probability by the policy is not finite.
            SyncError: of an on-policy batch the mean is above the bound.
        """
        gap = (current - behaviour).abs()
        gap_sum, tokens, broken = sum_over_learners(gap.sum(), mask.sum(), (~current.isfinite()).sum())
        mean, bound = float(gap_sum / tokens), self._distribution.max_logprob_gap
        if broken > 0:
            raise DivergenceError(f"{int(broken)} of the policy's {int(tokens)} log-probabilities are not finite")
        if not math.isfinite(mean) or (on_policy and mean > bound):
            raise SyncError(
                f"engine and learner differ by {mean:.3g} nats per token on the same policy "
                f"(rollout.max_logprob_gap={bound:g}); use rollout.base=dequantized, top_p=1, top_k=0, "
                "or raise the bound"
            )
        return {"logprob_gap_mean": mean, "logprob_gap_max": float(max_over_learners(gap.max()))}

    def _advantages(self, rewards: Tensor, kl: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages, whitened if so configured, and returns [B, R]; group estimators put the KL in the reward."""
        config, beta = self.config, self.kl_controller.coefficient
        if config.estimator == "gae":
            rewards_of_tokens = token_rewards(rewards, kl, mask, beta)
            advantages, returns = gae(rewards_of_tokens, values, mask, config.gamma, config.gae_lambda)
        else:
            estimate = rloo if config.estimator == "rloo" else grpo
            penalised = rewards - beta * kl.sum(dim=1)
            of_responses = estimate(penalised.view(-1, self._distribution.samples_per_prompt)).view(-1, 1)
            advantages, returns = torch.where(mask, of_responses, 0.0), torch.where(mask, penalised[:, None], 0.0)
        if config.whiten_advantages:
            sums = sum_over_learners(mask.sum(), advantages[mask].sum(), (advantages[mask] ** 2).sum())
            advantages = whiten(advantages, mask, *(s.float().to(self._device) for s in sums))
        return advantages, returns

    def _train(self, experience: Experience, step: int) -> dict[str, float]:
        """The epochs; stops early once the policy has moved further than `target_kl` from where it began."""
        config = self.config
        self.policy.set_dropout(True)
        parameters = list(self.policy.trainable().values())
        totals = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "grad_norm"), 0.0)
        steps, approx_kl = 0, 0.0
        for index in self._minibatches(experience.sequences, step):
            if config.target_kl is not None and approx_kl > config.target_kl:
                break
            tokens = sum_over_learners(experience.mask[index].sum())[0].float().to(self._device)
            sums = torch.zeros(4)
            self.optimizer.zero_grad()
            microbatches = self._microbatches(experience.sequences, index, len(index) // config.gradient_accumulation)
            for microbatch in microbatches:
                sums += self._backward(experience.rows(microbatch), tokens)
            sum_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            means = torch.stack(sum_over_learners(*sums)) / tokens.cpu()
            self._refuse_explosion(float(means[0]), float(means[1]), float(norm))
            self.optimizer.step()
            approx_kl = float(means[3])
            for name, value in zip(totals, [*means[:3], norm], strict=True):
                totals[name] += float(value)
            steps += 1
        return {name: total / steps for name, total in totals.items()} | {"approx_kl": approx_kl, "updates": steps}

    def _refuse_explosion(self, policy_loss: float, value_loss: float, norm: float) -> None:
        """Raises:
        DivergenceError: the gradient or a loss is not finite, or a loss is above `ppo.divergence.max_loss`.
        """
        bound = self.config.divergence.max_loss
        if not (math.isfinite(norm) and abs(policy_loss) <= bound and value_loss <= bound):
            raise DivergenceError(
                f"policy loss {policy_loss:.3g}, value loss {value_loss:.3g}, gradient norm {norm:.3g} "
                f"(ppo.divergence.max_loss={bound:g})"
            )

    def _backward(self, microbatch: Experience, tokens: Tensor) -> Tensor:
        """Add its gradients; sums over its tokens: policy loss, value loss, clipped ratios, approximate KL."""
        config, distribution = self.config, self._distribution
        entropy = "gradient" if config.entropy_coefficient > 0 else "none"
        now = self.policy(microbatch.sequences, distribution.temperature, self._suppressed, entropy)
        policy = policy_loss(
            now.logprobs,
            microbatch.proximal,
            microbatch.advantages,
            microbatch.importance,
            microbatch.mask,
            config.clip_range,
        )
        loss = policy.loss - config.entropy_coefficient * now.entropy.sum()
        value = torch.zeros(())
        if config.estimator == "gae":
            value = value_loss(
                now.values, microbatch.values, microbatch.returns, microbatch.mask, config.value_clip_range
            )
            loss = loss + config.value_coefficient * value
        (loss / tokens).backward()
        return torch.stack([x.detach().float().cpu() for x in (policy.loss, value, policy.clipped, policy.approx_kl)])

    @torch.no_grad()
    def _forward_without_gradient(self, sequences: Sequences, reference: bool) -> PolicyOutput:
        """The whole batch in microbatches of similar length; entropy only for the policy."""
        self.policy.set_dropout(False)
        shape = sequences.response_mask().shape
        whole = PolicyOutput(*(torch.zeros(shape, device=self._device) for _ in range(3)))
        everything = torch.arange(shape[0], device=self._device)
        parts = self.config.minibatches * self.config.gradient_accumulation
        for index in self._microbatches(sequences, everything, max(1, shape[0] // parts)):
            entropy = "none" if reference else "value"
            microbatch = self.policy(
                sequences.rows(index), self._distribution.temperature, self._suppressed, entropy, reference=reference
            )
            for name, tensor in vars(microbatch).items():
                getattr(whole, name)[index, : tensor.shape[1]] = tensor
        return whole

    def _minibatches(self, sequences: Sequences, step: int) -> Iterator[Tensor]:
        """Row indices of every optimiser step: the batch in `minibatches` equal parts, anew in each of the `epochs`.

        The rows of a part are any, or with `group_by_length` of similar length; then the order of the parts is the same
        on all learners, each of which waits for the one with the longest rows.
        """
        rows, parts = len(sequences.prompt_lengths), self.config.minibatches
        shared = np.random.default_rng((self._seed, step))
        for _ in range(self.config.epochs):
            order = torch.randperm(rows).to(self._device)
            if self.config.group_by_length:
                groups = self._microbatches(sequences, order, rows // parts)
                yield from (groups[place] for place in shared.permutation(parts))
            else:
                yield from order.chunk(parts)

    @staticmethod
    def _microbatches(sequences: Sequences, index: Tensor, size: int) -> list[Tensor]:
        """`index` in microbatches of `size` rows of similar length, so that little of a microbatch is padding."""
        lengths = (sequences.prompt_lengths + sequences.response_lengths)[index]
        return list(index[lengths.argsort()].split(size))

    def _set_learning_rate(self, step: int) -> None:
        config = self.config
        factor = schedule_factor(config, step, self._total_steps) * self.rate_scale
        for group, rate in zip(
            self.optimizer.param_groups, (config.learning_rate, config.value_learning_rate), strict=True
        ):
            group["lr"] = rate * factor

    def state(self) -> dict[str, Any]:
        """What training changes besides the adapter: value head, optimiser, KL coefficient, scale of the rates."""
        return {
            "value_head": self.policy.value_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "kl_coefficient": self.kl_controller.coefficient,
            "rate_scale": self.rate_scale,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.policy.value_head.load_state_dict(state["value_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl_controller.coefficient = state["kl_coefficient"]
        self.rate_scale = state["rate_scale"]
