import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detox_ray.config import PolicyConfig
from detox_ray.errors import DivergenceError, SyncError
from detox_ray.learner.ppo import PPO, SamplingDistribution
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import collate
from detox_ray.ppo_config import KLConfig, PPOConfig
from detox_ray.records import Rollout

pytestmark = pytest.mark.unit
DISTRIBUTION = SamplingDistribution(temperature=1.0, suppressed=(), samples_per_prompt=2, max_logprob_gap=1e-3)
ONE_OPTIMISER_STEP: dict[str, Any] = {"epochs": 1, "minibatches": 1}
REWARD_ALONE: dict[str, Any] = {"kl": KLConfig(coefficient=0.0), "whiten_advantages": False}


def learner(
    model: str, distribution: SamplingDistribution = DISTRIBUTION, quantization: str = "none", **options: Any
) -> PPO:
    config = PPOConfig(**{"batch_size": 8, "epochs": 2, "minibatches": 2, "learning_rate": 1e-3, **options})
    policy = Policy(PolicyConfig(model=model, quantization=quantization), torch.device("cpu"))
    return PPO(policy, config, distribution, pad_id=1, total_steps=10, seed=0)


def rollouts_of(ppo: PPO, seed: int = 0, count: int = 8) -> list[Rollout]:
    """Responses with the log-probabilities the learner itself gives them."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, 96, rng.integers(1, 9)) for _ in range(count)]
    responses = [rng.integers(2, 96, rng.integers(1, 13)) for _ in range(count)]
    with torch.no_grad():
        logprobs = ppo.policy(collate(prompts, responses, 1)).logprobs.numpy()
    return [
        Rollout(str(i // 2), "", p, r, logprobs[i, : len(r)].copy(), "", "stop", 0)
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
    ]


def rewards_of(count: int = 8) -> np.ndarray:
    return np.random.default_rng(1).normal(size=count).astype(np.float32)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_every_trainable_parameter_changes_and_no_frozen_one(tiny_model: str, quantization: str) -> None:
    ppo = learner(tiny_model, quantization=quantization)
    trainable = set(ppo.policy.trainable())
    before = {name: p.detach().clone() for name, p in ppo.policy.named_parameters()}
    for step in range(2):
        ppo.update(rollouts_of(ppo, step), rewards_of(), step, on_policy=True)
    changed = {name for name, p in ppo.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_the_better_of_two_arms_becomes_likelier(tiny_model: str, estimator: str) -> None:
    ppo = learner(tiny_model, estimator=estimator, kl=KLConfig(coefficient=0.0))
    prompt = np.array([5, 6, 7])
    arms = collate([prompt, prompt], [np.array([10]), np.array([20])], 1)
    with torch.no_grad():
        before = ppo.policy(arms).logprobs[:, 0]
    rollouts = [
        Rollout(str(i), "", prompt, np.array([arm]), np.array([before[j]], dtype=np.float32), "", "stop", 0)
        for i in range(4)
        for j, arm in enumerate([10, 20])
    ]
    metrics = ppo.update(rollouts, np.array([1.0, -1.0] * 4, dtype=np.float32), 0, on_policy=True)
    assert (metrics["value_loss"] > 0) == (estimator == "gae")
    with torch.no_grad():
        after = ppo.policy(arms).logprobs[:, 0]
    assert after[0] > before[0] + 0.01
    assert after[1] < before[1] - 0.01


def test_accumulated_gradients_are_those_of_the_whole_minibatch(tiny_model: str) -> None:
    results = []
    for pieces in (1, 4):
        ppo = learner(tiny_model, gradient_accumulation=pieces, minibatches=1, epochs=1, kl=KLConfig(coefficient=0.1))
        metrics = ppo.update(rollouts_of(ppo), rewards_of(), 0, on_policy=True)
        results.append((metrics, ppo.policy.adapter(0).tensors))
    (one, one_tensors), (four, four_tensors) = results
    assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)
    assert one["policy_loss"] == pytest.approx(four["policy_loss"], abs=1e-5)
    for name, tensor in one_tensors.items():
        assert np.abs(tensor - four_tensors[name]).max() < 1e-4


def test_an_engine_that_is_another_policy_is_refused(tiny_model: str) -> None:
    ppo = learner(tiny_model)
    rollouts = rollouts_of(ppo)
    for rollout in rollouts:
        rollout.logprobs[:] += 0.01
    with pytest.raises(SyncError, match=r"0\.01 nats per token.*max_logprob_gap"):
        ppo.update(rollouts, rewards_of(), 0, on_policy=True)
    metrics = ppo.update(rollouts, rewards_of(), 0, on_policy=False)
    assert metrics["importance_mean"] == pytest.approx(math.exp(-0.01), rel=1e-4)


def test_a_policy_whose_log_probabilities_are_not_finite_is_to_be_rolled_back(tiny_model: str) -> None:
    ppo = learner(tiny_model)
    rollouts = rollouts_of(ppo)
    with torch.no_grad():
        ppo.policy.adapter_parameters()[0][0, 0] = torch.nan
    with pytest.raises(DivergenceError, match="log-probabilities are not finite"):
        ppo.update(rollouts, rewards_of(), 0, on_policy=True)


def test_a_nan_from_the_engine_is_refused(tiny_model: str) -> None:
    ppo = learner(tiny_model)
    rollouts = rollouts_of(ppo)
    rollouts[3].logprobs[0] = np.nan
    with pytest.raises(SyncError):
        ppo.update(rollouts, rewards_of(), 0, on_policy=True)


def test_masked_end_tokens_are_masked_in_the_learner_too(tiny_model: str) -> None:
    ppo = learner(tiny_model, distribution=SamplingDistribution(1.0, (0,), 2, 1e-3))
    rollouts = rollouts_of(ppo)
    sequences = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], 1)
    with torch.no_grad():
        masked = ppo.policy(sequences, suppressed=torch.tensor([0])).logprobs.numpy()
    for rollout, row in zip(rollouts, masked, strict=True):
        assert (row[: len(rollout.logprobs)] > rollout.logprobs).all()
        rollout.logprobs[:] = row[: len(rollout.logprobs)]
    assert ppo.update(rollouts, rewards_of(), 0, on_policy=True)["logprob_gap_max"] < 1e-4


def test_metrics_equal_direct_computation(tiny_model: str) -> None:
    ppo = learner(tiny_model)
    ppo.update(rollouts_of(ppo), rewards_of(), 0, on_policy=True)
    rollouts = rollouts_of(ppo, seed=5)
    sequences = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], 1)
    with torch.no_grad():
        now = ppo.policy(sequences, entropy="value")
        reference = ppo.policy(sequences, reference=True)
    metrics = ppo.update(rollouts, rewards_of(), 1, on_policy=True)
    tokens = sum(len(r.response_ids) for r in rollouts)
    assert metrics["kl"] == pytest.approx((now.logprobs - reference.logprobs).sum().item() / 8, rel=1e-4)
    assert metrics["entropy"] == pytest.approx(now.entropy.sum().item() / tokens, rel=1e-5)
    assert metrics["response_length"] == pytest.approx(tokens / 8)


def test_effective_sample_size_and_capped_share_equal_direct_computation(tiny_model: str) -> None:
    ppo = learner(tiny_model, importance_cap=1.5)
    rollouts = rollouts_of(ppo)
    rng = np.random.default_rng(7)
    weights = []
    for rollout in rollouts:
        shift = rng.normal(0, 0.5, len(rollout.logprobs)).astype(np.float32)
        rollout.logprobs[:] -= shift
        weights += np.minimum(np.exp(shift), 1.5).tolist()
    metrics = ppo.update(rollouts, rewards_of(), 0, on_policy=False)
    assert metrics["importance_ess"] == pytest.approx(np.sum(weights) ** 2 / np.sum(np.square(weights)) / len(weights))
    assert metrics["importance_capped"] == pytest.approx(np.mean(np.array(weights) >= 1.5))


def test_updates_stop_beyond_target_kl(tiny_model: str) -> None:
    ppo = learner(tiny_model, target_kl=1e-6, epochs=4, learning_rate=1e-2)
    assert ppo.update(rollouts_of(ppo), rewards_of(), 0, on_policy=True)["updates"] < 8


def test_a_learner_restored_from_its_state_continues_as_if_nothing_had_happened(
    tiny_model: str, tmp_path: Path
) -> None:
    first = learner(tiny_model, kl=KLConfig(coefficient=0.1, adaptive=True))
    first.update(rollouts_of(first), rewards_of(), 0, on_policy=True)
    second = learner(tiny_model, kl=KLConfig(coefficient=0.1, adaptive=True))
    second.policy.load(first.policy.adapter(0))
    torch.save(first.state(), tmp_path / "learner.pt")
    second.load_state(torch.load(tmp_path / "learner.pt", weights_only=True))
    for ppo in (first, second):
        ppo.update(rollouts_of(ppo, seed=3), rewards_of(), 1, on_policy=True)
    assert first.policy.adapter(1).digest == second.policy.adapter(1).digest
    assert first.kl_controller.coefficient == second.kl_controller.coefficient


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_bitsandbytes_optimisers_step(tiny_model: str, optimizer: str) -> None:
    ppo = learner(tiny_model, optimizer=optimizer)
    before = ppo.policy.adapter(0).digest
    metrics = ppo.update(rollouts_of(ppo), rewards_of(), 0, on_policy=True)
    assert ppo.policy.adapter(0).digest != before
    assert math.isfinite(metrics["policy_loss"])


def test_learning_rates_warm_up_and_fall(tiny_model: str) -> None:
    ppo = learner(
        tiny_model,
        warmup_steps=2,
        schedule="linear",
        learning_rate=1e-3,
        value_learning_rate=5e-3,
        **ONE_OPTIMISER_STEP,
    )
    rollouts = rollouts_of(ppo)
    for step, factor in ((0, 0.5), (1, 0.9), (5, 0.5)):
        metrics = ppo.update(rollouts, rewards_of(), step, on_policy=False)
        assert metrics["learning_rate"] == pytest.approx(1e-3 * factor)
        assert [group["lr"] for group in ppo.optimizer.param_groups] == pytest.approx([1e-3 * factor, 5e-3 * factor])
        if step == 0:  # by which Adam's first step moves every number
            assert abs(ppo.policy.value_head.bias.item()) == pytest.approx(5e-3 * factor, rel=1e-3)


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_the_entropy_bonus_raises_the_entropy_and_without_it_there_is_nothing_to_learn(
    tiny_model: str, coefficient: float
) -> None:
    ppo = learner(tiny_model, entropy_coefficient=coefficient, **REWARD_ALONE)
    rollouts, before = rollouts_of(ppo), ppo.policy.adapter().digest
    entropies = [ppo.update(rollouts, np.zeros(8), step, on_policy=False)["entropy"] for step in range(3)]
    assert (ppo.policy.adapter().digest != before) == (coefficient > 0)
    rises = np.diff(entropies) > 1e-4
    assert rises.all() if coefficient > 0 else not rises.any()


def test_weight_decay_shrinks_an_adapter_that_has_nothing_to_learn(tiny_model: str) -> None:
    ppo = learner(tiny_model, weight_decay=0.5, learning_rate=0.1, **REWARD_ALONE, **ONE_OPTIMISER_STEP)
    before = ppo.policy.adapter().tensors
    ppo.update(rollouts_of(ppo), np.zeros(8), 0, on_policy=True)
    after = ppo.policy.adapter().tensors
    for name in before:
        np.testing.assert_allclose(after[name], before[name] * (1 - 0.1 * 0.5), rtol=1e-5)


def returns_of(rollouts: list[Rollout], gamma: float, gae_lambda: float) -> np.ndarray:
    """Those of all tokens while every value is 0: nothing but the last token's reward, discounted."""
    discounts = [(gamma * gae_lambda) ** np.arange(len(r.response_ids))[::-1] for r in rollouts]
    return np.concatenate([reward * discount for reward, discount in zip(rewards_of(), discounts, strict=True)])


@pytest.mark.parametrize("whiten", [False, True])
def test_the_policy_loss_before_the_first_optimiser_step_is_minus_the_mean_advantage(
    tiny_model: str, whiten: bool
) -> None:
    options = {**REWARD_ALONE, "whiten_advantages": whiten}
    ppo = learner(tiny_model, gamma=0.9, gae_lambda=0.8, **options, **ONE_OPTIMISER_STEP)
    rollouts = rollouts_of(ppo)
    metrics = ppo.update(rollouts, rewards_of(), 0, on_policy=True)
    expected = 0.0 if whiten else -returns_of(rollouts, 0.9, 0.8).mean()
    assert metrics["policy_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("coefficient", [0.0, 0.1, 0.5])
def test_the_value_coefficient_weighs_the_gradient_of_the_value_loss(tiny_model: str, coefficient: float) -> None:
    ppo = learner(tiny_model, value_coefficient=coefficient, max_grad_norm=1e9, **REWARD_ALONE, **ONE_OPTIMISER_STEP)
    rollouts = rollouts_of(ppo)
    ppo.update(rollouts, rewards_of(), 0, on_policy=True)
    bias = ppo.policy.value_head.bias
    assert bias.grad is not None
    assert bias.grad.item() == pytest.approx(-coefficient * returns_of(rollouts, 1.0, 0.95).mean(), abs=1e-6)
    assert (ppo.policy.value_head.weight != 0).any() == (coefficient > 0)


@pytest.mark.parametrize("clip_range", [0.01, 10.0])
def test_the_value_loss_is_of_values_that_move_at_most_by_the_clip_range(tiny_model: str, clip_range: float) -> None:
    options = {**REWARD_ALONE, "value_clip_range": clip_range, "value_learning_rate": 0.1, "minibatches": 1}
    once, twice = (learner(tiny_model, epochs=epochs, **options) for epochs in (1, 2))
    rollouts = rollouts_of(once)
    once.update(rollouts, rewards_of(), 0, on_policy=True)
    sequences = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], 1)
    with torch.no_grad():
        values = once.policy(sequences).values[sequences.response_mask()].numpy()
    assert np.abs(values).max() > 0.05
    returns = returns_of(rollouts, 1.0, 0.95)
    clipped = np.clip(values, -clip_range, clip_range)  # they were 0
    errors = [returns**2, np.maximum((values - returns) ** 2, (clipped - returns) ** 2)]
    metrics = twice.update(rollouts, rewards_of(), 0, on_policy=True)
    assert metrics["value_loss"] == pytest.approx(np.mean(errors) / 2, rel=1e-4)


def test_minibatches_grouped_by_length_hold_every_row_once_an_epoch_in_the_same_order_on_all_learners(
    tiny_model: str,
) -> None:
    ppo = learner(tiny_model, group_by_length=True, minibatches=4, epochs=3)
    lengths = np.random.default_rng(0).permutation(16) + 1
    sequences = collate([np.full(n, 5) for n in lengths], [np.array([10])] * 16, 1)
    of_learners = []
    for rank in range(2):
        torch.manual_seed(rank)
        of_learners.append([sorted(lengths[index].tolist()) for index in ppo._minibatches(sequences, step=7)])
    groups = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    for epoch in range(3):
        assert sorted(of_learners[0][4 * epoch : 4 * epoch + 4]) == groups
    assert of_learners[0] == of_learners[1]
    assert of_learners[0][:4] != of_learners[0][4:8]
