"""Two learners on halves of a batch are one learner on the whole: PPO with whitening and metrics, and fine-tuning."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detox_ray.config import PolicyConfig
from detox_ray.learner.distributed import on_first_learner
from detox_ray.learner.ppo import PPO, SamplingLaw
from detox_ray.learner.sft import SFT, share_of
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import collate
from detox_ray.ppo_config import KLConfig, OptimizerConfig, PPOConfig
from detox_ray.records import Rollout, TokenizedExample

pytestmark = pytest.mark.unit
COMPARED = ("kl", "entropy", "logprob_gap_max", "explained_variance", "response_length", "policy_loss", "value_loss")


def update(model: str, rows: slice) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """One step on some rows of a fixed batch of eight, as one minibatch."""
    policy = Policy(PolicyConfig(model=model, quantization="none"), torch.device("cpu"))
    config = PPOConfig(batch_size=8, epochs=1, minibatches=1, learning_rate=1e-3, kl=KLConfig(coefficient=0.1))
    ppo = PPO(policy, config, SamplingLaw(1.0, (), 1, 1.0), pad_id=1, total_steps=1, seed=0)
    with torch.no_grad():
        policy.value_head.weight.fill_(0.01)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 96, rng.integers(1, 9)) for _ in range(8)]
    responses = [rng.integers(2, 96, rng.integers(1, 13)) for _ in range(8)]
    with torch.no_grad():
        logprobs = policy(collate(prompts, responses, 1)).logprobs.numpy()
    rollouts = [
        Rollout(str(i), "", p, r, logprobs[i, : len(r)] + 0.01 * (i == 7), "", "stop", 0)
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
    ]
    rewards = rng.normal(size=8).astype(np.float32)
    metrics = ppo.update(rollouts[rows], rewards[rows], 0, on_policy=True)
    return metrics, policy.adapter(0).tensors


def tune(model: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """One step of fine-tuning on this learner's share of nine examples, of responses of very different lengths."""
    policy = Policy(PolicyConfig(model=model, quantization="none"), torch.device("cpu"))
    sft = SFT(policy, OptimizerConfig(learning_rate=1e-3), 64, pad_id=1, total_steps=1, seed=0)
    rng = np.random.default_rng(0)
    batch = [TokenizedExample(rng.integers(2, 96, 1 + i), rng.integers(2, 96, 1 + i * i // 2)) for i in range(9)]
    sft.look(share_of(batch), 0)
    metrics = sft.update(share_of(batch), 0)
    sft.look(share_of(batch), 1)
    return metrics | {"dev_loss_before": sft.dev_loss.first, "dev_loss": sft.dev_loss.last}, policy.adapter(0).tensors


def learner(rank: int, model: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=Path(folder, "port").read_text())
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    metrics, tensors = update(model, slice(rank * 4, rank * 4 + 4))
    tuned_metrics, tuned_tensors = tune(model)
    try:
        on_first_learner(lambda: 1 / 0)
        raised = False
    except ZeroDivisionError:
        raised = True
    found = {"metrics": metrics, "tensors": tensors, "raised": raised}
    torch.save(found | {"tuned_metrics": tuned_metrics, "tuned_tensors": tuned_tensors}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_learners_are_one(tiny_model: str, tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    mp.spawn(learner, args=(tiny_model, str(tmp_path)), nprocs=2)
    expected_metrics, expected_tensors = update(tiny_model, slice(0, 8))
    expected_tuned_metrics, expected_tuned_tensors = tune(tiny_model)
    for rank in range(2):
        result: dict[str, Any] = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert result["raised"]
        for name in COMPARED:
            assert result["metrics"][name] == pytest.approx(expected_metrics[name], rel=1e-3, abs=1e-6), name
        for name, tensor in expected_tensors.items():
            assert np.abs(result["tensors"][name] - tensor).max() < 1e-5, name
        assert result["tuned_metrics"] == pytest.approx(expected_tuned_metrics, rel=1e-4)
        for name, tensor in expected_tuned_tensors.items():
            assert np.abs(result["tuned_tensors"][name] - tensor).max() < 1e-5, name
