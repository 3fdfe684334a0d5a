import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from tuned_policies import CPU, assert_rows_close, batch, plain_base, policy_of

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.errors import ModelError
from detox_ray.policy.adapter import content_digest, load_adapter, save_adapter
from detox_ray.policy.architecture import response_logits
from detox_ray.policy.load import load_base, load_tokenizer, write_dequantized_base
from detox_ray.policy.policy import Policy, canary_of, check_adapter
from detox_ray.policy.sequences import Sequences

pytestmark = pytest.mark.unit


def transformers_logprobs(model, sequences: Sequences) -> list[torch.Tensor]:
    """Sequence by sequence, without padding, from the model's own logits."""
    rows = []
    for ids, p, r in zip(sequences.input_ids, sequences.prompt_lengths, sequences.response_lengths, strict=True):
        ids = ids[: p + r]
        with torch.no_grad():
            logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        rows.append(logprobs[p - 1 : -1].gather(1, ids[p:, None])[:, 0])
    return rows


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_logprobs_equal_those_of_transformers_on_the_dequantised_base(
    tiny_model: str, tmp_path: Path, quantization: str
) -> None:
    policy = policy_of(tiny_model, quantization)
    folder = plain_base(tiny_model, quantization, tmp_path / "base")
    save_adapter(policy.adapter(0), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert_rows_close(policy(batch(), reference=True).logprobs, transformers_logprobs(base, batch()))
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_rows_close(policy(batch()).logprobs, transformers_logprobs(tuned, batch()))
    assert np.allclose(policy.canary(150).logprobs, canary_of(tuned, 150).logprobs, atol=1e-4)


def test_an_adapter_is_read_and_loaded_without_asking_the_hub(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(tiny_model)
    policy.model.peft_config["default"].base_model_name_or_path = "owner/name"
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_: pytest.fail("asked"))
    policy.load(policy.adapter())


def test_nf4_is_not_the_original(tiny_model: str) -> None:
    difference = policy_of(tiny_model, "nf4")(batch()).logprobs - policy_of(tiny_model)(batch()).logprobs
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradients_are_the_same_after_a_scoring_pass(tiny_model: str, quantization: str) -> None:
    policy = policy_of(tiny_model, quantization)

    def gradients() -> dict[str, torch.Tensor]:
        policy.zero_grad()
        policy(batch()).logprobs.sum().backward()
        return {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}

    before = gradients()
    policy.eval()
    with torch.no_grad():
        policy(batch(), reference=True)
        policy(batch(), entropy="value")
    policy.train()
    after = gradients()
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        assert torch.allclose(gradient, after[name], rtol=1e-4, atol=1e-6), name


def test_nf4_gradients_point_where_those_of_the_dequantised_base_do(tiny_model: str, tmp_path: Path) -> None:
    folder = write_dequantized_base(PolicyConfig(model=tiny_model), tmp_path / "base", CPU, torch.float32)
    flat = []
    for policy in (policy_of(tiny_model, "nf4"), policy_of(str(folder))):
        with torch.no_grad():
            policy(batch())
        policy(batch()).logprobs.sum().backward()
        flat.append(torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0) > 0.9999


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_bfloat16_the_adapter_computes_as_the_base_does_and_trains_in_float32(
    tiny_model: str, tmp_path: Path, quantization: str
) -> None:
    """As near to float32's gradients as PEFT's own, which computes the adapter in float32."""
    policy = policy_of(tiny_model, quantization, compute_dtype="bfloat16")
    made: set[torch.dtype] = set()
    for name, module in policy.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda module, inputs, output: made.add(output.dtype))
    policy(batch()).logprobs.sum().backward()
    assert made == {torch.bfloat16}
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}

    exact = policy_of(tiny_model, quantization)
    exact(batch()).logprobs.sum().backward()
    save_adapter(exact.adapter(0), tmp_path / "adapter")
    config = PolicyConfig(model=tiny_model, quantization=quantization, compute_dtype="bfloat16")
    peft = PeftModel.from_pretrained(load_base(config, CPU), str(tmp_path / "adapter"), is_trainable=True)
    mask = batch().response_mask()
    logprobs = response_logits(peft, batch())[mask].float().log_softmax(1)
    logprobs.gather(1, batch().response_ids()[mask][:, None]).sum().backward()

    flat = [
        torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_" in name])
        for model in (exact, policy, peft)
    ]
    ours, theirs = (torch.nn.functional.cosine_similarity(flat[0], other, dim=0) for other in flat[1:])
    assert ours > theirs - 0.02
    assert theirs > (0.95 if quantization == "none" else 0.8)  # of a random model, which magnifies every rounding


def test_in_bfloat16_the_frozen_reference_computes_as_the_base_does(tiny_model: str, tmp_path: Path) -> None:
    save_adapter(policy_of(tiny_model).adapter(0), tmp_path / "adapter")
    start = {"adapter": str(tmp_path / "adapter"), "reference": "adapter", "compute_dtype": "bfloat16"}
    policy = policy_of(tiny_model, random_adapter=False, **start)
    with torch.no_grad():
        assert torch.equal(policy(batch(), reference=True).logprobs, policy(batch()).logprobs)


def test_gradient_checkpointing_changes_no_gradient(tiny_model: str) -> None:
    results = []
    for checkpointing in (False, True):
        policy = policy_of(tiny_model, gradient_checkpointing=checkpointing)
        policy(batch()).logprobs.sum().backward()
        results.append({n: p.grad for n, p in policy.trainable().items() if p.grad is not None})
    for name, gradient in results[0].items():
        assert torch.allclose(gradient, results[1][name], atol=1e-4), name


def test_only_adapter_and_value_head_train(tiny_model: str) -> None:
    names = policy_of(tiny_model).trainable()
    assert all("lora_" in name or name.startswith("value_head") for name in names)
    assert sum("lora_A" in name for name in names) == 2 * 7


def test_entropy_is_that_of_the_distribution(tiny_model: str) -> None:
    policy = policy_of(tiny_model)
    sequences = batch().rows(torch.tensor([2]))
    with torch.no_grad():
        logits = policy.model(input_ids=sequences.input_ids).logits[0, :12]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(policy(sequences, entropy="value").entropy[0], expected, atol=1e-4)


def test_an_adapter_of_another_base_is_refused(tiny_model: str, tmp_path: Path) -> None:
    other = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, eos_token_id=0
    )
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    save_adapter(policy_of(str(tmp_path / "other")).adapter(0), tmp_path / "adapter")
    config = PolicyConfig(model=tiny_model, adapter=str(tmp_path / "adapter"), lora=LoraConfig(rank=4, alpha=8))
    with pytest.raises(ModelError, match="does not fit the base"):
        check_adapter(config)
    check_adapter(config.model_copy(update={"model": str(tmp_path / "other")}))
    with pytest.raises(ModelError, match="does not fit the base"):
        policy_of(tiny_model, adapter=str(tmp_path / "adapter"))


def test_an_adapter_of_another_scale_is_refused(tiny_model: str, tmp_path: Path) -> None:
    save_adapter(policy_of(tiny_model).adapter(0), tmp_path / "adapter")
    config = PolicyConfig(model=tiny_model, adapter=str(tmp_path / "adapter"), lora=LoraConfig(rank=4, alpha=16))
    with pytest.raises(ModelError, match=r"lora_alpha=8\.0 and policy\.lora makes lora_alpha=16\.0"):
        check_adapter(config)


def test_dropout_is_off_in_the_canary_and_on_in_training(tiny_model: str) -> None:
    config = PolicyConfig(model=tiny_model, quantization="none", lora=LoraConfig(rank=4, dropout=0.5))
    policy = Policy(config, CPU)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    policy.set_dropout(True)
    assert not torch.equal(policy(batch()).logprobs, policy(batch()).logprobs)
    assert np.array_equal(policy.canary(150).logprobs, policy.canary(150).logprobs)


def test_a_saved_adapter_is_the_adapter(tiny_model: str, tmp_path: Path) -> None:
    adapter = policy_of(tiny_model).adapter(3)
    save_adapter(adapter, tmp_path / "adapter")
    loaded = replace(load_adapter(tmp_path / "adapter"), version=3)
    assert loaded.digest == adapter.digest == content_digest(loaded.peft_config, loaded.tensors)
    changed = copy.deepcopy(loaded.tensors)
    next(iter(changed.values()))[0, 0] += 1e-6
    assert content_digest(loaded.peft_config, changed) != adapter.digest


def test_a_broken_adapter_file_is_one_clear_error(tiny_model: str, tmp_path: Path) -> None:
    save_adapter(policy_of(tiny_model).adapter(0), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapter(tmp_path / "adapter")


def test_model_errors_name_the_value_and_the_fix(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(PolicyConfig(model=str(tmp_path / "nowhere")))
    tokenizer = load_tokenizer(PolicyConfig(model=tiny_model))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no-pad")
    with pytest.raises(ModelError, match=r"no pad token.*policy\.pad_token='<eos>'"):
        load_tokenizer(PolicyConfig(model=str(tmp_path / "no-pad")))
    assert load_tokenizer(PolicyConfig(model=str(tmp_path / "no-pad"), pad_token="<eos>")).pad_token_id == 0
    with pytest.raises(ModelError, match=r"lora\.targets"):
        Policy(PolicyConfig(model=tiny_model, lora=LoraConfig(targets=["nonsense"])), CPU)
