"""One step of fine-tuning against plain `transformers` with labels of -100, and what must not matter to it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.learner.sft import SFT, WINDOW, BucketedBatches, DevLoss, microbatches_by_length, steps_per_epoch
from detox_ray.learner.sft_loop import _keep_best
from detox_ray.policy.adapter import load_adapter, save_adapter
from detox_ray.policy.policy import Policy
from detox_ray.ppo_config import OptimizerConfig
from detox_ray.records import TokenizedExample

pytestmark = pytest.mark.unit
CONFIG = OptimizerConfig(learning_rate=1e-3, max_grad_norm=1e9)


def learner(
    model: str, microbatch_tokens: int = 64, quantization: str = "none", dropout: float = 0.0, random: bool = True
) -> SFT:
    lora = LoraConfig(rank=4, dropout=dropout)
    policy = Policy(PolicyConfig(model=model, quantization=quantization, lora=lora), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if random and "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return SFT(policy, CONFIG, microbatch_tokens, pad_id=1, total_steps=10, seed=0)


def examples(count: int = 8, seed: int = 0) -> list[TokenizedExample]:
    rng = np.random.default_rng(seed)
    return [
        TokenizedExample(rng.integers(2, 96, rng.integers(1, 30)), rng.integers(2, 96, rng.integers(1, 9)))
        for _ in range(count)
    ]


def reference_loss(sft: SFT, batch: list[TokenizedExample], model: str, folder: Path) -> tuple[float, torch.Tensor]:
    """Loss and gradient of all LoRA weights, example by example with labels of -100, by `transformers` and `peft`."""
    save_adapter(sft.policy.adapter(0), folder)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder, is_trainable=True)
    tokens = sum(len(e.response_ids) for e in batch)
    total = 0.0
    for example in batch:
        ids = torch.from_numpy(np.concatenate([example.prompt_ids, example.response_ids]))[None]
        labels = ids.clone()
        labels[0, : len(example.prompt_ids)] = -100
        loss = tuned(input_ids=ids, labels=labels).loss * len(example.response_ids) / tokens
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for _, p in sorted(tuned.named_parameters()) if p.grad is not None])


@pytest.mark.parametrize("microbatch_tokens", [1, 64, 10_000])
def test_loss_and_gradient_are_those_of_each_example_alone(
    tiny_model: str, tmp_path: Path, microbatch_tokens: int
) -> None:
    sft, batch = learner(tiny_model, microbatch_tokens), examples()
    loss, gradient = reference_loss(sft, batch, tiny_model, tmp_path / "adapter")
    assert sft.loss(batch) == pytest.approx(loss, rel=1e-5)
    metrics = sft.update(batch, step=0)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["response_tokens"] == sum(len(e.response_ids) for e in batch)
    assert metrics["tokens"] == sum(len(e) for e in batch)
    named = sorted((n, p) for n, p in sft.policy.model.named_parameters() if p.requires_grad)
    found = torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])
    assert torch.allclose(found, gradient, rtol=1e-3, atol=1e-6)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_no_example_sees_another_or_what_is_behind_it(tiny_model: str) -> None:
    sft = learner(tiny_model, microbatch_tokens=10_000)
    batch = examples()
    with torch.no_grad():
        alone = [float(sft._negative_logprob([example])) for example in batch]
        for others in (examples(seed=7), examples(seed=8)):
            together = float(sft._negative_logprob([batch[0], *others]))
            rest = sum(float(sft._negative_logprob([other])) for other in others)
            assert together - rest == pytest.approx(alone[0], abs=1e-3)
    changed = TokenizedExample(batch[1].prompt_ids[::-1].copy(), batch[1].response_ids)
    assert sft.loss([batch[0], changed]) != pytest.approx(sft.loss(batch[:2]), abs=1e-6)


def test_responses_are_learned(tiny_model: str) -> None:
    sft, batch = learner(tiny_model, random=False), examples()
    before = sft.loss(batch)
    for step in range(20):
        sft.update(batch, step)
    assert sft.loss(batch) < before / 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_whole_adapter_changes_and_nothing_else(tiny_model: str, quantization: str) -> None:
    sft = learner(tiny_model, quantization=quantization, random=False)
    before = {name: p.detach().clone() for name, p in sft.policy.named_parameters()}
    for step in range(2):
        sft.update(examples(seed=step), step)
    changed = {name for name, p in sft.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_dropout_is_on_in_training_and_off_in_the_dev_loss(tiny_model: str) -> None:
    sft, batch = learner(tiny_model, dropout=0.5), examples()
    plain = learner(tiny_model)
    assert sft.loss(batch) == pytest.approx(plain.loss(batch), rel=1e-6)
    assert sft.update(batch, 0)["loss"] != pytest.approx(plain.update(batch, 0)["loss"], rel=1e-3)


def test_a_learner_restored_from_its_state_continues_as_if_nothing_had_happened(
    tiny_model: str, tmp_path: Path
) -> None:
    first, second = learner(tiny_model, dropout=0.1), learner(tiny_model, dropout=0.1)
    first.evaluate(examples(), 0)
    first.update(examples(), 0)
    first.evaluate(examples(), 1)
    second.policy.load(first.policy.adapter(0))
    torch.save(first.state(), tmp_path / "learner.pt")
    second.load_state(torch.load(tmp_path / "learner.pt", weights_only=True))
    for sft in (first, second):
        sft.update(examples(seed=3), 1)
        sft.evaluate(examples(), 2)
    assert first.policy.adapter(1).digest == second.policy.adapter(1).digest
    assert first.dev_loss == second.dev_loss


def test_the_best_adapter_comes_back_where_the_runs_was_lost(tiny_model: str, tmp_path: Path) -> None:
    first, second = learner(tiny_model), learner(tiny_model)
    first.evaluate(examples(), 0)
    torch.save(first.state(), tmp_path / "learner.pt")
    untrained = first.policy.adapter()
    first.update(examples(), 0)
    second.load_state(torch.load(tmp_path / "learner.pt", weights_only=True))
    second.policy.load(first.policy.adapter())
    second._negative_logprob = lambda examples: torch.tensor(1e6)  # no later look is better
    second.evaluate(examples(), 1)
    _keep_best(second, tmp_path)
    assert load_adapter(tmp_path / "adapter").digest == untrained.digest != second.policy.adapter().digest
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    _keep_best(second, tmp_path)
    assert load_adapter(tmp_path / "adapter").digest == untrained.digest


def test_the_best_of_the_dev_losses_is_remembered() -> None:
    found = DevLoss(3.0, 3.0, 3.0)
    assert [found.take(loss, steps) for steps, loss in ((5, 2.0), (10, 2.5), (15, 2.0), (20, 1.9))] == [
        True,
        False,
        False,
        True,
    ]
    assert found == DevLoss(first=3.0, last=1.9, best=1.9, best_steps=20, looks_since_best=0)
    assert not found.take(float("nan"), 25)


def test_batches_hold_every_example_once_a_pass_and_are_of_similar_length() -> None:
    pool = examples(WINDOW * 4 * 3)
    batches = BucketedBatches(pool, 4, seed=0)
    one_pass = [batches(step) for step in range(WINDOW * 3)]
    assert sorted(id(e) for batch in one_pass for e in batch) == sorted(map(id, pool))
    assert all(len(batch) == 4 for batch in one_pass)
    spread = [max(map(len, batch)) - min(map(len, batch)) for batch in one_pass]
    assert np.mean(spread) < 5 < max(map(len, pool)) - min(map(len, pool))
    lengths = [len(batch[0]) for batch in one_pass[:WINDOW]]
    assert lengths != sorted(lengths)
    again = BucketedBatches(pool, 4, seed=0)(17)
    assert [id(e) for e in again] == [id(e) for e in one_pass[17]]
    assert [id(e) for e in BucketedBatches(pool, 4, seed=1)(17)] != [id(e) for e in one_pass[17]]


@pytest.mark.parametrize("size", [3, 32, 33, 257, 300])
def test_every_pass_has_every_example_once_whatever_their_number(size: int) -> None:
    pool = examples(size)
    batches = BucketedBatches(pool, 32, seed=0)
    steps = steps_per_epoch(size, 32)
    for first in (0, steps):
        one_pass = [batches(step) for step in range(first, first + steps)]
        assert sorted(id(e) for batch in one_pass for e in batch) == sorted(map(id, pool))
        assert max(map(len, one_pass)) - min(map(len, one_pass)) <= 1
        assert max(map(len, one_pass)) <= 32


def test_pieces_hold_what_fits_and_everything_once() -> None:
    batch = examples(40)
    microbatches = list(microbatches_by_length(batch, 100))
    assert sorted(map(id, (e for microbatch in microbatches for e in microbatch))) == sorted(map(id, batch))
    assert all(
        len(microbatch) == 1 or len(microbatch) * max(map(len, microbatch)) <= 100 for microbatch in microbatches
    )
    padded = sum(len(microbatch) * max(map(len, microbatch)) for microbatch in microbatches)
    assert sum(map(len, batch)) / padded > 0.85
    assert [len(microbatch) for microbatch in microbatches_by_length(batch, 1)] == [1] * 40
