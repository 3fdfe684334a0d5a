"""The compiled passes against the plain ones."""

import pytest
import torch
from torch import Tensor
from tuned_policies import CPU, batch, policy_of

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import Sequences

pytestmark = pytest.mark.unit


def look(policy: Policy, sequences: Sequences) -> dict[str, Tensor]:
    """What a policy answers, its reference too, and the gradients of the answers."""
    with torch.no_grad():
        found = {"reference": policy(sequences, reference=True).logprobs}
    policy.zero_grad()
    now = policy(sequences, entropy="value")
    (now.logprobs.sum() + now.values.sum()).backward()
    gradients = {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in (found | vars(now) | gradients).items()}


def test_compiled_passes_compute_the_same_and_are_compiled_once_for_all_lengths(tiny_model: str) -> None:
    plain = policy_of(tiny_model)
    config = PolicyConfig(model=tiny_model, quantization="none", lora=LoraConfig(rank=4, alpha=8))
    compiled = Policy(config, CPU, compiled=True)
    compiled.load(plain.adapter(0))
    compiled.value_head.load_state_dict(plain.value_head.state_dict())
    whole = batch()
    look(compiled, whole)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in ([0, 1, 2, 3], [1, 3], [0, 0, 1, 2, 2, 3]):
            sequences = whole.rows(torch.tensor(rows))
            expected, found = look(plain, sequences), look(compiled, sequences)
            assert found.keys() == expected.keys()
            for name in expected:
                assert torch.allclose(found[name], expected[name], atol=1e-4), name
