"""One step of PPO and of fine-tuning, to be taken by one learner or by two, and how two of them meet."""

import os
import socket
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from detox_ray.config import PolicyConfig
from detox_ray.learner.ppo import PPO, SamplingDistribution
from detox_ray.learner.sft import SFT, share_of
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import collate
from detox_ray.ppo_config import KLConfig, OptimizerConfig, PPOConfig
from detox_ray.records import Rollout, TokenizedExample


def choose_port(folder: Path) -> None:
    """Note a free port where the learners will look for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))


def join_learners(rank: int, folder: str) -> None:
    """Become one of two learners."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=Path(folder, "port").read_text())
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)


def update(model: str, rows: slice, shard_base: bool = False) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """One step on some rows of a fixed batch of eight, as one minibatch."""
    policy = Policy(PolicyConfig(model=model, quantization="none"), torch.device("cpu"), shard_base=shard_base)
    config = PPOConfig(batch_size=8, epochs=1, minibatches=1, learning_rate=1e-3, kl=KLConfig(coefficient=0.1))
    ppo = PPO(policy, config, SamplingDistribution(1.0, (), 1, 1.0), pad_id=1, total_steps=1, seed=0)
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


def tune(model: str, shard_base: bool = False) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """One step of fine-tuning on this learner's share of nine examples, of responses of very different lengths."""
    policy = Policy(PolicyConfig(model=model, quantization="none"), torch.device("cpu"), shard_base=shard_base)
    sft = SFT(policy, OptimizerConfig(learning_rate=1e-3), 64, pad_id=1, total_steps=1, seed=0)
    rng = np.random.default_rng(0)
    batch = [TokenizedExample(rng.integers(2, 96, 1 + i), rng.integers(2, 96, 1 + i * i // 2)) for i in range(9)]
    sft.evaluate(share_of(batch), 0)
    metrics = sft.update(share_of(batch), 0)
    sft.evaluate(share_of(batch), 1)
    return metrics | {"dev_loss_before": sft.dev_loss.first, "dev_loss": sft.dev_loss.last}, policy.adapter(0).tensors
