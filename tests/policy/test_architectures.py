"""What the learner computes and what a worker merges, of every family of the field, against plain `peft`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, save_family
from peft import PeftModel
from transformers import AutoModelForCausalLM
from tuned_policies import policy_of

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.policy.adapter import save_adapter
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import collate
from detox_ray.rollout.merge import load_pristine_weights, merged_weights

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_merged_weights_are_those_of_peft(family: str, tmp_path: Path) -> None:
    config = PolicyConfig(model=save_family(family, tmp_path / "base"), quantization="none", lora=LoraConfig(rank=4))
    policy = Policy(config, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    save_adapter(policy.adapter(0), tmp_path / "adapter")
    rng = np.random.default_rng(0)
    prompts, responses = [rng.integers(2, 96, n) for n in (3, 20)], [rng.integers(2, 96, n) for n in (9, 2)]
    with torch.no_grad():
        found = policy(collate(prompts, responses, 1)).logprobs

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    pristine = load_pristine_weights(str(tmp_path / "base"), None)
    before = {name: tensor.clone() for name, tensor in pristine.items()}
    weights = dict(merged_weights(pristine, policy.adapter(0)))
    assert all(torch.equal(pristine[name], tensor) for name, tensor in before.items())
    _, unexpected = merged.load_state_dict(weights, strict=False)
    if unexpected:  # a checkpoint without the name of the trunk
        merged.base_model.load_state_dict(weights, strict=False)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    for row, prompt, response in zip(found, prompts, responses, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))
        for model in (tuned, merged):
            with torch.no_grad():
                logprobs = model.eval()(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logprobs.gather(1, ids[len(prompt) :, None])[:, 0]
            assert torch.allclose(row[: len(response)], expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_computes_nearly_the_same_and_has_gradients(family: str, tmp_path: Path) -> None:
    model = save_family(family, tmp_path / "base")
    rng = np.random.default_rng(0)
    sequences = collate([rng.integers(2, 96, n) for n in (3, 20)], [rng.integers(2, 96, n) for n in (9, 2)], 1)
    half, full = (policy_of(model, compute_dtype=dtype) for dtype in ("bfloat16", "float32"))
    logprobs = half(sequences).logprobs
    logprobs.sum().backward()
    with torch.no_grad():
        gap = (logprobs - full(sequences).logprobs)[sequences.response_mask()].abs()
    assert gap.mean() < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.adapter_parameters())
