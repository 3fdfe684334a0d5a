"""Every decoder-only family of the field, from a tiny random model of its class in hub format."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.policy.adapter import save_adapter
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import collate
from detox_ray.rollout.merge import load_pristine_weights, merged_weights

pytestmark = pytest.mark.unit
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
NEO: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": NEO,
    "GPTJ": {**NEO, "rotary_dim": 16},
    "GPTNeo": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "GPTNeoX": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "Falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "OPT": {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 64,
    },
    "Llama": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": {**LLAMA, "head_dim": 32},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_merged_weights_are_those_of_peft(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path / "base")
    config = PolicyConfig(model=str(tmp_path / "base"), quantization="none", lora=LoraConfig(rank=4))
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
