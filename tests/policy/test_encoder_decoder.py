"""T5 as a policy, against plain `transformers` and `peft`, sequence by sequence and without padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, MT5Config, T5Config
from tuned_policies import CPU, assert_rows_close, batch, plain_base, policy_of

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.errors import ModelError
from detox_ray.policy.adapter import save_adapter
from detox_ray.policy.architecture import language_model_head, response_states
from detox_ray.policy.load import load_model_config, load_tokenizer
from detox_ray.policy.policy import Policy, canary_of, check_adapter
from detox_ray.policy.sequences import Sequences
from detox_ray.policy.systems import Systems

pytestmark = pytest.mark.unit
START = 1


@pytest.fixture(scope="module", params=[True, False], ids=["t5", "t5-v1.1"])
def model(request: pytest.FixtureRequest, save_tiny_t5: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"), first=request.param)


def each(sequences: Sequences) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompt and response of every sequence, [1, P] and [1, R]."""
    lengths = zip(sequences.prompt_lengths, sequences.response_lengths, strict=True)
    return [(ids[None, :p], ids[None, p : p + r]) for ids, (p, r) in zip(sequences.input_ids, lengths, strict=True)]


def logits_alone(model: Any, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """[R, V] by the model's own forward pass with labels, which makes the decoder's input itself."""
    return model(input_ids=prompt, labels=response).logits[0]


def logprobs_alone(model: Any, sequences: Sequences) -> list[torch.Tensor]:
    return [
        logits_alone(model, prompt, response).log_softmax(-1).gather(1, response[0, :, None])[:, 0]
        for prompt, response in each(sequences)
    ]


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_logprobs_are_those_of_transformers_on_the_dequantised_base(
    model: str, tmp_path: Path, quantization: str
) -> None:
    policy = policy_of(model, quantization)
    folder = plain_base(model, quantization, tmp_path / "base")
    save_adapter(policy.adapter(0), tmp_path / "adapter")
    base = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_rows_close(policy(batch(), reference=True).logprobs, logprobs_alone(base, batch()), 2e-5)
        assert_rows_close(policy(batch()).logprobs, logprobs_alone(tuned, batch()), 2e-5)
        changed = torch.cat(logprobs_alone(tuned, batch())) - torch.cat(logprobs_alone(base, batch()))
    assert changed.abs().max() > 0.1
    assert np.allclose(policy.canary(150).logprobs, canary_of(tuned, 150).logprobs, atol=1e-4)
    assert np.abs(canary_of(base, 150).logprobs - canary_of(tuned, 150).logprobs).max() > 0.1


def test_values_and_entropy_are_those_of_the_decoder(model: str, tmp_path: Path) -> None:
    policy = policy_of(model)
    save_adapter(policy.adapter(0), tmp_path / "adapter")
    tuned: Any = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(model), tmp_path / "adapter").eval()
    with torch.no_grad():
        found = policy(batch(), temperature=0.7, entropy="value")
        values, entropies = [], []
        for prompt, response in each(batch()):
            distribution = (logits_alone(tuned, prompt, response) / 0.7).log_softmax(-1)
            entropies.append(-(distribution.exp() * distribution).sum(-1))
            output = tuned(input_ids=prompt, labels=response, output_hidden_states=True)
            values.append(policy.value_head(output.decoder_hidden_states[-1])[0, :, 0])
    assert_rows_close(found.entropy, entropies, 1e-4)
    assert_rows_close(found.values, values, 1e-4)


def test_gradients_are_those_of_transformers_loss(model: str, tmp_path: Path) -> None:
    policy = policy_of(model)
    save_adapter(policy.adapter(0), tmp_path / "adapter")
    tuned = PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(model), tmp_path / "adapter", is_trainable=True
    ).eval()
    (-policy(batch()).logprobs.sum()).backward()
    for prompt, response in each(batch()):
        (tuned(input_ids=prompt, labels=response).loss * response.shape[1]).backward()
    expected = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    # Encoder, decoder and the attention between them.
    assert all(any(part in name for name in found) for part in (".encoder.", ".decoder.", ".EncDecAttention."))
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradients_are_the_same_after_a_scoring_pass_and_with_checkpointing(tiny_t5: str, quantization: str) -> None:
    def gradients(policy: Policy) -> torch.Tensor:
        policy.zero_grad()
        policy(batch()).logprobs.sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None])

    policy = policy_of(tiny_t5, quantization)
    before = gradients(policy)
    with torch.no_grad():
        policy(batch(), reference=True)
    assert torch.allclose(gradients(policy), before, rtol=1e-4, atol=1e-6)
    checkpointed = policy_of(tiny_t5, quantization, gradient_checkpointing=True)
    assert torch.allclose(gradients(checkpointed), before, rtol=1e-3, atol=1e-4)


def test_bfloat16_computes_nearly_the_same(model: str) -> None:
    with torch.no_grad():
        half = policy_of(model, compute_dtype="bfloat16")(batch()).logprobs
        full = policy_of(model)(batch()).logprobs
    mask = batch().response_mask()
    assert (half - full)[mask].abs().mean() < 0.05


def test_what_the_adapter_trains_is_every_linear_layer_but_the_head(model: str) -> None:
    targets = policy_of(model).adapter(0).peft_config["target_modules"]
    assert {"q", "k", "v", "o", "wo"} < set(targets)
    assert "lm_head" not in targets
    assert policy_of(model).adapter(0).peft_config["task_type"] == "SEQ_2_SEQ_LM"


def test_head_and_padding_are_those_of_mt5() -> None:
    torch.manual_seed(0)
    options = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    mt5 = AutoModelForSeq2SeqLM.from_config(MT5Config(**options, decoder_start_token_id=START)).eval()
    with torch.no_grad():
        logits = language_model_head(mt5)(response_states(mt5, batch()))
        for row, (prompt, response) in zip(logits, each(batch()), strict=True):
            assert torch.allclose(row[: response.shape[1]], logits_alone(mt5, prompt, response), atol=1e-4)


def test_systems_that_answer_together_are_each_of_them_alone(tiny_t5: str, tmp_path: Path) -> None:
    policy = policy_of(tiny_t5)
    save_adapter(policy.adapter(0), tmp_path / "adapter")
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(tiny_t5), tmp_path / "adapter").eval()
    prompt = [40, 41, 7, 60, 0]
    systems = Systems(PolicyConfig(model=tiny_t5, quantization="none"), [tmp_path / "adapter"], CPU)
    answers = list(zip(*systems.answer(prompt, (), 12, seed=3), strict=True))
    assert [t.token_id for t in answers[0] if t] != [t.token_id for t in answers[1] if t]
    for answer, own in zip(answers, (base, tuned), strict=True):
        tokens = [token for token in answer if token is not None]
        ids = torch.tensor([[token.token_id for token in tokens]])
        with torch.no_grad():
            rows = [logits_alone(m, torch.tensor([prompt]), ids).log_softmax(-1) for m in (own, tuned, base)]
        alone, after, before = (row.gather(1, ids[0, :, None])[:, 0] for row in rows)
        assert torch.allclose(torch.tensor([token.logprob for token in tokens]), alone, atol=1e-4)
        assert torch.allclose(torch.tensor([token.shift for token in tokens]), after - before, atol=2e-4)


def test_dropout_of_the_base_is_off(tiny_t5: str) -> None:
    assert load_model_config(PolicyConfig(model=tiny_t5)).dropout_rate == 0
    policy = policy_of(tiny_t5)
    assert torch.equal(policy(batch()).logprobs, policy(batch()).logprobs)


def test_refusals_name_the_value_and_the_fix(tiny_t5: str, tiny_model: str, tmp_path: Path) -> None:
    config = T5Config.from_pretrained(tiny_t5)
    config.decoder_start_token_id = None
    config.save_pretrained(tmp_path / "no-start")
    with pytest.raises(ModelError, match=r"no-start is an encoder-decoder.*no decoder_start_token_id; set it"):
        load_model_config(PolicyConfig(model=str(tmp_path / "no-start")))
    BartConfig().save_pretrained(tmp_path / "bart")
    with pytest.raises(ModelError, match="bart is an encoder-decoder of type bart; use one of type t5 or mt5, or a"):
        load_model_config(PolicyConfig(model=str(tmp_path / "bart")))
    with pytest.raises(ModelError, match="no module 'query'; it has k, lm_head, o, q, v, wi, wo"):
        check_adapter(PolicyConfig(model=tiny_t5, lora=LoraConfig(targets=["query"])))
    # A decoder-only model with a tokenizer that ends what it should continue.
    load_model_config(PolicyConfig(model=tiny_model)).save_pretrained(tmp_path / "ended")
    AutoTokenizer.from_pretrained(tiny_t5).save_pretrained(tmp_path / "ended")
    with pytest.raises(ModelError, match=r"writes <eos> behind every text.*add_eos_token"):
        load_tokenizer(PolicyConfig(model=str(tmp_path / "ended")))
