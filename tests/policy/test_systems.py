"""Systems in one batch against each of them alone, in plain transformers and peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import COMMON, FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TopPLogitsWarper

from detox_ray.config import PolicyConfig
from detox_ray.errors import ModelError
from detox_ray.policy.load import write_dequantized_base
from detox_ray.policy.systems import Systems, SystemToken, choose_tokens

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
PROMPT = [0, 40, 41, 7, 60]


def save_random_adapter(model: str | Path, folder: Path, seed: int, targets: Any = "all-linear") -> Path:
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_random_adapter(tiny_model, folder / str(seed), seed) for seed in (1, 2)]


def answers(systems: Systems, end_ids: tuple[int, ...] = (), **settings: Any) -> list[list[SystemToken]]:
    """The whole answer of each system."""
    steps = list(systems.answer(PROMPT, end_ids, **{"max_new_tokens": 12, **settings}))
    return [[token for token in column if token is not None] for column in zip(*steps, strict=True)]


def logprobs(model: Any, ids: list[int]) -> list[float]:
    """Of the tokens after the prompt, from one pass over the whole sequence."""
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([PROMPT + ids])).logits[0].log_softmax(-1)
    return rows[len(PROMPT) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def alone(base: str | Path, adapters: list[Path]) -> list[Any]:
    """Each system as a model of its own."""
    load = AutoModelForCausalLM.from_pretrained
    return [load(base).eval(), *(PeftModel.from_pretrained(load(base), folder).eval() for folder in adapters)]


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_greedy_answers_and_logprobs_are_those_of_each_system_alone(
    tiny_model: str, adapters: list[Path], tmp_path: Path, quantization: str
) -> None:
    config = PolicyConfig(model=tiny_model, quantization=quantization)
    found = answers(Systems(config, adapters, CPU), temperature=0)
    base: str | Path = tiny_model
    if quantization != "none":
        base = write_dequantized_base(config, tmp_path / "base", CPU, torch.float32)
    models = alone(base, adapters)
    assert len({tuple(token.token_id for token in answer) for answer in found}) == 3
    for system, (answer, model) in enumerate(zip(found, models, strict=True)):
        ids = [token.token_id for token in answer]
        generated = model.generate(
            input_ids=torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1
        )
        assert ids == generated[0, len(PROMPT) :].tolist()
        assert [token.logprob for token in answer] == pytest.approx(logprobs(model, ids), abs=1e-4)
        tuned = models[-1] if system == 0 else model
        shifts = [t - b for t, b in zip(logprobs(tuned, ids), logprobs(models[0], ids), strict=True)]
        assert [token.shift for token in answer] == pytest.approx(shifts, abs=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_an_adapter(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path / "base")
    adapter = save_random_adapter(tmp_path / "base", tmp_path / "adapter", seed=1)
    systems = Systems(PolicyConfig(model=str(tmp_path / "base"), quantization="none"), [adapter], CPU)
    for answer, model in zip(answers(systems), alone(tmp_path / "base", [adapter]), strict=True):
        ids = [token.token_id for token in answer]
        assert [token.logprob for token in answer] == pytest.approx(logprobs(model, ids), abs=1e-4)


def test_a_base_alone_has_no_shift(tiny_model: str) -> None:
    [answer] = answers(Systems(PolicyConfig(model=tiny_model), [], CPU))
    assert len(answer) == 12
    assert {token.shift for token in answer} == {None}


def test_the_seed_decides_and_equal_systems_answer_alike(tiny_model: str, adapters: list[Path]) -> None:
    systems = Systems(PolicyConfig(model=tiny_model), [adapters[0], adapters[0]], CPU)
    first = answers(systems, seed=3)
    assert first == answers(systems, seed=3)
    assert first != answers(systems, seed=4)
    assert [t.token_id for t in first[1]] == [t.token_id for t in first[2]]
    assert [t.token_id for t in first[0]] != [t.token_id for t in first[1]]


def test_an_answer_ends_with_its_end_token_and_the_others_go_on(tiny_model: str, adapters: list[Path]) -> None:
    systems = Systems(PolicyConfig(model=tiny_model), adapters[:1], CPU)
    free = answers(systems, seed=3)
    end = free[1][4].token_id
    assert end not in [token.token_id for token in free[0] + free[1][:4]]
    ended = answers(systems, (end,), seed=3)
    assert ended[0] == free[0]
    assert ended[1] == free[1][:5]


def test_the_nucleus_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 30) * 3
    kept = TopPLogitsWarper(0.8)(None, logits / 0.7).isfinite()  # type: ignore[arg-type]  # it reads no input ids
    # Noise that favours one token as far as can be: it is chosen just where the nucleus has it.
    for token in range(30):
        noise = torch.zeros(30)
        noise[token] = 1e6
        assert torch.equal(choose_tokens(logits, noise, 0.7, 0.8) == token, kept[:, token])


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    noise = -torch.empty(40_000, 4).exponential_().log()
    drawn = torch.stack([choose_tokens(logits, row, 2.0, 1.0)[0] for row in noise])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(shares, (logits[0] / 2).softmax(0), atol=0.01)


def test_an_adapter_of_another_base_is_refused(tiny_model: str, tmp_path: Path) -> None:
    other = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    adapter = save_random_adapter(tmp_path / "other", tmp_path / "adapter", seed=1)
    with pytest.raises(ModelError, match=f"adapter {adapter} does not fit {tiny_model}"):
        Systems(PolicyConfig(model=tiny_model, quantization="none"), [adapter], CPU)
