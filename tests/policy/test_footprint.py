"""Sizes from shapes, against published parameter counts and against real models in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import COMMON, FAMILIES
from transformers import AutoModelForCausalLM

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.policy.architecture import response_states
from detox_ray.policy.footprint import activation_bytes, cache_bytes_per_token, load_skeleton, weight_bytes
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import collate

pytestmark = pytest.mark.unit


def neo(hidden: int, layers: int, heads: int) -> Any:
    pairs = [[["global", "local"], layers // 2]]
    return transformers.GPTNeoConfig(hidden_size=hidden, num_layers=layers, num_heads=heads, attention_types=pairs)


# The configurations of the published models -> the number of parameters their cards and papers give.
PUBLISHED: dict[str, tuple[Callable[[], Any], int]] = {
    "t5-small": (lambda: transformers.T5Config(**{"decoder_start_token_id": 0}), 60_506_624),
    "gpt-neo-125M": (lambda: neo(768, 12, 12), 125_198_592),
    "gpt-neo-2.7B": (lambda: neo(2560, 32, 20), 2_651_307_520),
    "gpt-j-6B": (transformers.GPTJConfig, 6_050_882_784),
    "falcon-7b": (
        lambda: transformers.FalconConfig(
            vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, multi_query=True
        ),
        6_921_720_704,
    ),
    "RedPajama-INCITE-3B": (
        lambda: transformers.GPTNeoXConfig(
            vocab_size=50432,
            hidden_size=2560,
            num_hidden_layers=32,
            num_attention_heads=32,
            intermediate_size=10240,
        ),
        2_775_864_320,
    ),
    "Llama-3.2-1B": (
        lambda: transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=8192,
            tie_word_embeddings=True,
        ),
        1_235_814_400,
    ),
    "Qwen3-8B": (
        lambda: transformers.Qwen3Config(
            vocab_size=151936,
            hidden_size=4096,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=12288,
            head_dim=128,
            tie_word_embeddings=False,
        ),
        8_190_735_360,
    ),
}


def saved(config: Any, folder: Path) -> PolicyConfig:
    config.save_pretrained(folder)
    return PolicyConfig(model=str(folder), quantization="none", lora=LoraConfig(rank=4))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name: str, tmp_path: Path) -> None:
    make, parameters = PUBLISHED[name]
    shape = load_skeleton(saved(make(), tmp_path), torch.bfloat16)
    assert shape.base_parameters() == parameters
    assert weight_bytes(shape, "none") == 2 * parameters
    assert activation_bytes(shape, 2, 16, 16, True) < activation_bytes(shape, 2, 16, 16, False)


def test_keys_and_values_of_a_token(tmp_path: Path) -> None:
    # Layers x (keys, values) x heads x head size x 2 bytes; Falcon's queries share one head.
    falcon, llama = (PUBLISHED[name][0]() for name in ("falcon-7b", "Llama-3.2-1B"))
    assert cache_bytes_per_token(load_skeleton(saved(falcon, tmp_path / "a"), torch.bfloat16)) == 32 * 2 * 64 * 2
    assert cache_bytes_per_token(load_skeleton(saved(llama, tmp_path / "b"), torch.bfloat16)) == 16 * 2 * 8 * 64 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_a_real_pass_keeps(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path)
    config = PolicyConfig(model=str(tmp_path), quantization="none", lora=LoraConfig(rank=4))
    # What differs is the attention mask, which some models make otherwise without numbers.
    assert activation_bytes(load_skeleton(config, torch.float32), 4, 20, 20, False) == pytest.approx(
        kept_by_a_pass(config, 20, 20), rel=0.15
    )


def test_activations_of_an_encoder_decoder_are_those_of_both_its_halves(tiny_t5: str) -> None:
    config = PolicyConfig(model=tiny_t5, quantization="none", lora=LoraConfig(rank=4))
    shape = load_skeleton(config, torch.float32)
    for prompt, response in ((40, 10), (10, 40)):
        real = kept_by_a_pass(config, prompt, response)
        assert activation_bytes(shape, 4, prompt, response, False) == pytest.approx(real, rel=0.15)
    # Keys and values of two decoder layers, of the response and, for the attention between the halves, of the prompt.
    assert cache_bytes_per_token(shape) == 2 * 2 * 64 * 4


def kept_by_a_pass(config: PolicyConfig, prompt: int, response: int) -> int:
    """Bytes that autograd keeps of four sequences."""
    policy = Policy(config, torch.device("cpu"))
    kept: dict[int, torch.Tensor] = {}
    own = {t.untyped_storage().data_ptr() for t in (*policy.model.parameters(), *policy.model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    sequences = collate([[5] * prompt] * 4, [[6] * response] * 4, 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_states(policy.model.get_base_model(), sequences)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("model", ["tiny_model", "tiny_t5"])
@pytest.mark.parametrize(("quantization", "double"), [("none", True), ("nf4", True), ("nf4", False)])
def test_weights_are_those_of_a_loaded_model(
    model: str, quantization: str, double: bool, request: pytest.FixtureRequest
) -> None:
    config = PolicyConfig.model_validate(
        {"model": request.getfixturevalue(model), "quantization": quantization, "double_quantization": double}
    )
    base = Policy(config, torch.device("cpu")).model.get_base_model()
    real = 0
    for parameter in base.parameters():
        if not parameter.requires_grad:
            real += parameter.untyped_storage().nbytes()
            if (state := getattr(parameter, "quant_state", None)) is not None:
                real += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    expected = weight_bytes(load_skeleton(config, torch.float32), quantization, double)
    # Second-level scales of a tiny layer are a whole number of blocks.
    assert expected == pytest.approx(real, rel=0.01)
