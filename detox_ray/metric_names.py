"""Every metric of a run: its unit and what it says. docs/metrics.md is this file as tables."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What the numbers under one name are."""

    unit: str
    meaning: str


@dataclass(frozen=True)
class Family:
    """Metrics named `prefix/...`: one for each classifier or term; on Prometheus `gauge` with that as `label`."""

    gauge: str
    label: str
    metric: Metric


# A line of metrics.jsonl of `detox-ray train`.
TRAINING = {
    "step": Metric("steps", "number of the step, from 0"),
    "ended_at": Metric("seconds since 1970", "when the step was finished"),
    "reward": Metric("reward", "mean over the batch's responses of what PPO maximises, without the KL penalty"),
    "reward_raw": Metric("reward", "the same without the shaping terms: the ensemble's aggregate"),
    "reward_std": Metric("reward", "standard deviation of `reward` over the responses"),
    "disagreement": Metric("reward", "mean over responses of the standard deviation of the members' scores"),
    "toxicity": Metric(
        "probability", "mean toxicity by the judge, if that is `linear`; of training responses, not part of the reward"
    ),
    "share_finished": Metric("share", "responses that ended with an end token before `rollout.max_new_tokens`"),
    "response_length": Metric("tokens", "mean length of a response, its end token included"),
    "kl": Metric(
        "nats per response",
        "KL to the reference policy: mean over responses of the sum over tokens of log p - log p_reference (k1)",
    ),
    "kl_coefficient": Metric("reward per nat", "beta, by which the KL of each token is taken from its reward"),
    "entropy": Metric("nats per token", "mean entropy of the policy's distributions at the sampled positions"),
    "policy_loss": Metric(
        "reward", "clipped surrogate, mean over tokens and optimiser steps (Schulman et al. 2017, eq. 7)"
    ),
    "value_loss": Metric("squared reward", "clipped squared error of the value head, likewise; 0 without one"),
    "explained_variance": Metric("share", "1 - variance of returns minus values / variance of returns; 1 is perfect"),
    "clip_fraction": Metric(
        "share", "tokens whose policy ratio was outside 1 +- `ppo.clip_range`, mean over optimiser steps"
    ),
    "approx_kl": Metric(
        "nats per token",
        "mean of ratio - 1 - log ratio over the last minibatch, before its optimiser step",
    ),
    "grad_norm": Metric("gradient", "norm of the gradient before it is clipped, mean over optimiser steps"),
    "learning_rate": Metric("rate", "of the adapter, schedule and roll-backs included"),
    "updates": Metric("steps", "optimiser steps made; fewer than planned after `ppo.target_kl`"),
    "logprob_gap_mean": Metric("nats per token", "mean |log p by the rollout engine - log p by the learner|"),
    "logprob_gap_max": Metric("nats per token", "the largest such difference in the batch"),
    "importance_mean": Metric(
        "ratio", "mean over tokens of the truncated weight p_proximal / p_behaviour; 1 when strictly on-policy"
    ),
    "importance_ess": Metric(
        "share", "effective sample size of those weights: (sum w)^2 / (tokens * sum w^2); 1 when all are equal"
    ),
    "importance_capped": Metric("share", "tokens whose weight reached `ppo.importance_cap`"),
    "staleness": Metric("versions", "adapters published since the oldest response of the batch was begun"),
    "adapter_version": Metric("versions", "the version that the step published"),
    "rejected": Metric("attempts", "times the step had to be rejected before it was good; see rejected_steps.jsonl"),
    "dropped_batches": Metric("batches", "sampled for nothing: the rejected ones and those under way then"),
    "worker_restarts": Metric("restarts", "rollout workers lost and brought back, since the learner started"),
    "time_acknowledge_s": Metric("seconds", "the learner waited until every worker had acknowledged the last adapter"),
    "time_rollout_s": Metric("seconds", "then for responses"),
    "time_reward_s": Metric("seconds", "then for scores"),
    "time_learn_s": Metric("seconds", "forward and backward passes and optimiser steps"),
    "time_push_s": Metric("seconds", "`time_acknowledge_s`, and for the canary and sending the new adapter"),
    "time_step_s": Metric("seconds", "from asking for a batch until its adapter is sent; writing files is not in it"),
    "tokens_per_s": Metric("tokens per second", "response tokens of the batch / `time_step_s`"),
    "samples_per_s": Metric("responses per second", "responses of the batch / `time_step_s`"),
}

# A line of metrics.jsonl of `detox-ray sft`.
TUNING = {
    "step": Metric("steps", "number of the optimiser step, from 0"),
    "ended_at": Metric("seconds since 1970", "when the step was finished"),
    "loss": Metric("nats per token", "cross-entropy, mean over the batch's response tokens"),
    "dev_loss": Metric("nats per token", "the same over the dev examples, on steps that look at it"),
    "grad_norm": Metric("gradient", "norm of the gradient before it is clipped"),
    "learning_rate": Metric("rate", "of the adapter"),
    "response_tokens": Metric("tokens", "of the batch, learned from"),
    "tokens": Metric("tokens", "of the batch, prompts included"),
    "time_learn_s": Metric("seconds", "forward and backward passes and the optimiser step"),
    "time_dev_s": Metric("seconds", "for the dev loss, on steps that look at it"),
    "tokens_per_s": Metric("tokens per second", "`tokens` / `time_learn_s`"),
}

# A line of evaluations.jsonl: the judge on held-out prompts while it trains; trackers put `judge/` before the names.
JUDGED = {
    "step": Metric("steps", "number of the step whose adapter answered, from 0"),
    "mean_toxicity": Metric("probability", "mean over the responses"),
    "share_toxic": Metric("share", "responses with toxicity of at least 0.5"),
    "mean_length": Metric("tokens", "mean length of a response, its end token not counted"),
    "reward": Metric("reward", "of the step's training batch, for comparison"),
    "responses": Metric("responses", "that were judged"),
}

FAMILIES = {
    "reward": Family(
        "classifier_reward", "classifier", Metric("reward", "mean calibrated score of one member; less toxic is higher")
    ),
    "shaping": Family(
        "shaping_reward", "term", Metric("reward", "mean of one shaping term, where it is not 0 for all responses")
    ),
    "judge": Family("judge", "metric", Metric("as in evaluations.jsonl", "the judge while it trains")),
}


def gauge_name(name: str) -> str:
    """What Prometheus calls a metric: Ray puts `ray_` before names of ours."""
    return f"detox_ray_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}"
