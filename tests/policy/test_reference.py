"""The reference of the KL: the base, or the adapter that training starts from; no one but the KL may see it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.learner.ppo import PPO, SamplingDistribution
from detox_ray.policy.adapter import load_adapter, save_adapter
from detox_ray.policy.policy import Policy, canary_of
from detox_ray.policy.sequences import collate
from detox_ray.ppo_config import PPOConfig
from detox_ray.records import Rollout

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(2, 96, n) for n in (3, 8, 5, 1)]
RESPONSES = [RNG.integers(2, 96, n) for n in (4, 2, 9, 6)]


@pytest.fixture(scope="module")
def start(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the model, as fine-tuning leaves one."""
    policy = Policy(PolicyConfig(model=tiny_model, quantization="none", lora=LoraConfig(rank=4)), CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    folder = tmp_path_factory.mktemp("fine-tuned") / "adapter"
    save_adapter(policy.adapter(0), folder)
    return folder


def policy_from(start: Path, model: str, reference: str, quantization: str = "none") -> Policy:
    lora = LoraConfig(rank=4)
    config = PolicyConfig(model=model, quantization=quantization, lora=lora, adapter=str(start), reference=reference)  # type: ignore[arg-type]  # plain strings
    return Policy(config, CPU)


def ppo_step(policy: Policy) -> dict[str, float]:
    distribution = SamplingDistribution(temperature=1.0, suppressed=(), samples_per_prompt=1, max_logprob_gap=1e-3)
    ppo = PPO(
        policy, PPOConfig(batch_size=4, epochs=1, learning_rate=1e-2), distribution, pad_id=1, total_steps=1, seed=0
    )
    with torch.no_grad():
        logprobs = policy(collate(PROMPTS, RESPONSES, 1)).logprobs.numpy()
    rollouts = [
        Rollout(str(i), "", p, r, logprobs[i, : len(r)].copy(), "", "stop", 0)
        for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]
    return ppo.update(rollouts, np.array([1.0, -1.0, 0.5, 0.0], dtype=np.float32), 0, on_policy=True)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_kl_is_taken_to_the_model_that_was_chosen(start: Path, tiny_model: str, quantization: str) -> None:
    assert ppo_step(policy_from(start, tiny_model, "adapter", quantization))["kl"] == 0.0
    assert abs(ppo_step(policy_from(start, tiny_model, "base", quantization))["kl"]) > 0.1


def test_the_reference_is_what_plain_peft_computes_and_stays_so(start: Path, tiny_model: str) -> None:
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), start).eval()
    policy = policy_from(start, tiny_model, "adapter")
    ppo_step(policy)
    with torch.no_grad():
        reference = policy(collate(PROMPTS, RESPONSES, 1), reference=True).logprobs
        now = policy(collate(PROMPTS, RESPONSES, 1)).logprobs
        for row, prompt, response in zip(reference, PROMPTS, RESPONSES, strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, response]))
            logits = tuned(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
            assert torch.allclose(row[: len(response)], expected, atol=1e-4)
    assert (now - reference).abs().max() > 1e-3


def test_only_the_trained_adapter_is_trained_saved_and_answers_canaries(
    start: Path, tiny_model: str, tmp_path: Path
) -> None:
    policy, plain = policy_from(start, tiny_model, "adapter"), policy_from(start, tiny_model, "base")
    assert policy.trainable().keys() == plain.trainable().keys()
    assert len(policy.adapter_parameters()) == len(plain.adapter_parameters())
    assert policy.adapter(0).digest == plain.adapter(0).digest == load_adapter(start).digest
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    ppo_step(policy)
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(plain.trainable())
    save_adapter(policy.adapter(1), tmp_path / "adapter")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    assert np.allclose(policy.canary(150).logprobs, canary_of(tuned.eval(), 150).logprobs, atol=1e-4)
    # Continuing from a checkpoint replaces what is trained, not what the KL is taken to.
    again = policy_from(start, tiny_model, "adapter")
    again.load(policy.adapter(1))
    sequences = collate(PROMPTS, RESPONSES, 1)
    with torch.no_grad():
        assert torch.equal(again(sequences, reference=True).logprobs, policy(sequences, reference=True).logprobs)
        assert torch.equal(again(sequences).logprobs, policy(sequences).logprobs)


def test_gradients_are_the_same_after_a_pass_of_the_reference(start: Path, tiny_model: str) -> None:
    policy, sequences = policy_from(start, tiny_model, "adapter", "nf4"), collate(PROMPTS, RESPONSES, 1)

    def gradients() -> list[torch.Tensor]:
        policy.zero_grad()
        policy(sequences).logprobs.sum().backward()
        return [p.grad.clone() for p in policy.adapter_parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        policy(sequences, reference=True)
    after = gradients()
    assert len(after) == len(before) == len(policy.adapter_parameters())
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(after, before, strict=True))


def test_a_reference_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"policy\.reference=adapter needs policy\.adapter"):
        PolicyConfig(reference="adapter")
