"""T5 through the learners and the engine: every trained weight moves, and engine and learner are one policy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.errors import SyncError
from detox_ray.learner.ppo import PPO, SamplingDistribution
from detox_ray.learner.sft import SFT
from detox_ray.policy.adapter import save_adapter
from detox_ray.policy.load import write_dequantized_base
from detox_ray.policy.policy import CANARY_LENGTH, Policy
from detox_ray.ppo_config import OptimizerConfig, PPOConfig
from detox_ray.records import Prompt, Sampling, TokenizedExample
from detox_ray.rollout.engine import EngineSpec, in_order
from detox_ray.rollout.pool import canary_gaps
from detox_ray.rollout.transformers_engine import TransformersEngine

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
LORA = LoraConfig(rank=4)
END, PAD = 0, 1


def engine_of(model: str) -> TransformersEngine:
    spec = EngineSpec("transformers", "adapter", model, None, "float32", 160, (END,), PAD, 4, 5, 16)
    return TransformersEngine(spec)


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(str(n), "", (*rng.integers(2, 96, n).tolist(), END)) for n in (1, 7, 30, 60)]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_ppo_steps_on_what_the_engine_samples(tiny_t5: str, tmp_path: Path, quantization: str) -> None:
    config = PolicyConfig(model=tiny_t5, quantization=quantization, lora=LORA)
    policy = Policy(config, CPU)
    served = tiny_t5
    if quantization == "nf4":
        served = str(write_dequantized_base(config, tmp_path / "base", CPU, torch.float32))
    engine = engine_of(served)
    distribution = SamplingDistribution(0.8, (), 2, max_logprob_gap=1e-4)
    options = PPOConfig(batch_size=8, epochs=2, minibatches=2, gradient_accumulation=2, learning_rate=1e-3)
    ppo = PPO(policy, options, distribution, PAD, total_steps=10, seed=0)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    rewards = np.random.default_rng(1).normal(size=8).astype(np.float32)
    for step in range(2):
        engine.apply(policy.adapter(step))
        rollouts = in_order(engine.generate(prompts(), 2, Sampling(max_new_tokens=12, temperature=0.8, seed=step)))
        assert {r.adapter_version for r in rollouts} == {step}
        # On-policy: the update itself refuses a gap above 1e-4 nats.
        metrics = ppo.update(rollouts, rewards, step, on_policy=True)
        assert metrics["logprob_gap_max"] < 1e-4
        assert (abs(metrics["kl"]) < 1e-5) == (step == 0)
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(policy.trainable())


def test_responses_end_at_the_end_token_and_masked_ones_do_not(tiny_t5: str) -> None:
    engine = engine_of(tiny_t5)
    free = in_order(engine.generate(prompts(), 16, Sampling(max_new_tokens=24, seed=1)))
    stopped = [r for r in free if r.finish_reason == "stop"]
    assert stopped
    assert all(r.response_ids[-1] == END and END not in r.response_ids[:-1] for r in stopped)
    assert all(len(r.response_ids) == 24 and END not in r.response_ids for r in free if r.finish_reason == "length")
    fixed = in_order(engine.generate(prompts(), 2, Sampling(max_new_tokens=24, fixed_length=True, seed=1)))
    assert all(len(r.response_ids) == 24 and END not in r.response_ids for r in fixed)


def test_the_canary_notices_a_stale_adapter(tiny_t5: str) -> None:
    policy = Policy(PolicyConfig(model=tiny_t5, quantization="none", lora=LORA), CPU)
    engine = engine_of(tiny_t5)
    engine.apply(policy.adapter(0))
    old = policy.canary(CANARY_LENGTH)
    assert canary_gaps(engine.next_token_logprobs(old.prefixes), old).max() < 1e-4
    # A change of the encoder alone, and one of the decoder alone.
    for part in (".encoder.", ".decoder."):
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                if "lora_B" in name and part in name:
                    parameter.normal_(0, 0.05)
        new = policy.canary(CANARY_LENGTH)
        assert canary_gaps(engine.next_token_logprobs(new.prefixes), new).max() > 1e-2
        engine.apply(policy.adapter(engine.version + 1))
        assert canary_gaps(engine.next_token_logprobs(new.prefixes), new).max() < 1e-4


def test_an_adapter_of_another_model_is_refused_by_the_engine(tiny_t5: str, tiny_model: str) -> None:
    adapter = Policy(PolicyConfig(model=tiny_model, quantization="none", lora=LORA), CPU).adapter(0)
    with pytest.raises(SyncError):
        engine_of(tiny_t5).apply(replace(adapter, version=1))


def test_fine_tuning_is_transformers_loss_of_each_example_alone(tiny_t5: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batch = [
        TokenizedExample(np.append(rng.integers(2, 96, p), END), np.append(rng.integers(2, 96, r), END))
        for p, r in [(3, 5), (40, 1), (1, 12), (17, 9), (20, 3)]
    ]
    policy = Policy(PolicyConfig(model=tiny_t5, quantization="none", lora=LORA), CPU)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    save_adapter(policy.adapter(0), tmp_path / "adapter")
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    tuned: Any = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    tokens = sum(len(e.response_ids) for e in batch)
    loss = 0.0
    for example in batch:
        prompt, response = (torch.from_numpy(ids)[None] for ids in (example.prompt_ids, example.response_ids))
        own = tuned(input_ids=prompt, labels=response).loss * len(example.response_ids) / tokens
        own.backward()
        loss += own.item()
    gradient = torch.cat([p.grad.flatten() for _, p in sorted(tuned.named_parameters()) if p.grad is not None])
    sft = SFT(policy, OptimizerConfig(max_grad_norm=1e9), 64, PAD, total_steps=10, seed=0)
    metrics = sft.update(batch, step=0)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
