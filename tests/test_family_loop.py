"""The whole loop of every family: fine-tuning, pushes, rollouts, PPO, export, and what plain libraries load of it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, save_family
from peft import PeftModel
from transformers import AutoModelForCausalLM

from detox_ray.config import Config, LoraConfig, PolicyConfig, RolloutConfig
from detox_ray.config_file import dump_config, parse_config
from detox_ray.export import export
from detox_ray.learner.ppo import PPO, SamplingDistribution
from detox_ray.learner.sft import SFT
from detox_ray.plan import plan_engine, with_dequantized_base
from detox_ray.policy.adapter import save_adapter
from detox_ray.policy.policy import Policy, canary_of
from detox_ray.ppo_config import OptimizerConfig, PPOConfig
from detox_ray.records import Prompt, Sampling, TokenizedExample
from detox_ray.rollout.engine import EngineSpec, in_order
from detox_ray.rollout.transformers_engine import TransformersEngine
from detox_ray.run_folder import RunFolder

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
ROLLOUT = RolloutConfig(engine="transformers", max_new_tokens=8)
CANARY_LENGTH = 150
TOLERANCE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_loop(family: str, tmp_path: Path) -> None:
    model = save_family(family, tmp_path / "hub" / family)
    base = PolicyConfig(model=model, lora=LoraConfig(rank=4))
    tuned = base.model_copy(update={"adapter": str(tmp_path / "fine-tuned"), "reference": "adapter"})
    run = open_run(tmp_path / "run", tuned)
    spec, line = plan_engine(base, ROLLOUT, max_prompt_tokens=60, learner_device=CPU)
    assert line.startswith("rollout engine: transformers")
    engine = TransformersEngine(with_dequantized_base(spec, base, ROLLOUT, run, CPU))

    learner = fine_tune(base)
    push(engine, learner, version=0)
    save_adapter(learner.adapter(0), tmp_path / "fine-tuned")
    learner = improve(tuned, engine, spec)
    push(engine, learner, version=2)
    save_adapter(learner.adapter(2), run.adapter)
    assert_loads(learner, family, run, tmp_path)


def open_run(folder: Path, policy: PolicyConfig) -> RunFolder:
    """A run folder as training would have left it, but for the adapter."""
    classifier = {"name": "words", "kind": "linear", "model": "some.module:function"}
    config: Config = parse_config({"policy": policy.model_dump(), "reward": {"classifiers": [classifier]}})
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return RunFolder(folder)


def fine_tune(config: PolicyConfig) -> Policy:
    """Two steps, in which the whole adapter changes and nothing else."""
    sft = SFT(Policy(config, CPU), OptimizerConfig(learning_rate=1e-2), 256, pad_id=1, total_steps=2, seed=0)
    before = copies(sft.policy)
    rng = np.random.default_rng(0)
    examples = [
        TokenizedExample(rng.integers(2, VOCABULARY, rng.integers(1, 30)), rng.integers(2, VOCABULARY, 5))
        for _ in range(8)
    ]
    losses = [sft.update(examples, step)["loss"] for step in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    assert changed(sft.policy, before) == {name for name in before if "lora_" in name}
    return sft.policy


def improve(config: PolicyConfig, engine: TransformersEngine, spec: EngineSpec) -> Policy:
    """Two steps of PPO from the fine-tuned adapter, which is also the reference, on the engine's rollouts.

    `on_policy` has the learner check the engine's log-probabilities against its own.
    """
    ppo = PPO(
        Policy(config, CPU),
        PPOConfig(batch_size=8, epochs=1, minibatches=2, learning_rate=1e-2),
        SamplingDistribution(temperature=1.0, suppressed=(), samples_per_prompt=2, max_logprob_gap=TOLERANCE),
        pad_id=spec.pad_id,
        total_steps=2,
        seed=0,
    )
    before, trainable = copies(ppo.policy), set(ppo.policy.trainable())
    rng = np.random.default_rng(1)
    prompts = [Prompt(str(n), "", tuple(rng.integers(2, VOCABULARY, n).tolist())) for n in (1, 7, 23, 60)]
    metrics = []
    for step in range(2):
        rollouts = in_order(engine.generate(prompts, 2, Sampling(max_new_tokens=8, seed=step)))
        metrics.append(ppo.update(rollouts, rng.normal(size=8).astype(np.float32), step, on_policy=True))
        push(engine, ppo.policy, version=step + 1)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert metrics[1]["kl"] != pytest.approx(0, abs=1e-5)
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    assert changed(ppo.policy, before) == trainable
    return ppo.policy


def push(engine: TransformersEngine, learner: Policy, version: int) -> None:
    """The engine serves the adapter, and its canary is the learner's."""
    engine.apply(learner.adapter(version))
    canary = learner.canary(CANARY_LENGTH)
    for answer, expected in zip(engine.next_token_logprobs(canary.prefixes), canary.logprobs, strict=True):
        assert all(abs(expected[token] - logprob) < TOLERANCE for token, logprob in answer.items())


def assert_loads(learner: Policy, family: str, run: RunFolder, folder: Path) -> None:
    """What `export` writes computes what the learner computes, in plain `transformers` and `peft`."""
    expected = learner.canary(CANARY_LENGTH).logprobs
    merged = AutoModelForCausalLM.from_pretrained(export(run.path, folder / "merged"))
    (base,) = run.path.glob("dequantized_base-*")
    pristine = AutoModelForCausalLM.from_pretrained(base)
    assert np.abs(canary_of(pristine, CANARY_LENGTH).logprobs - expected).max() > 0.01
    published = AutoModelForCausalLM.from_pretrained(folder / "hub" / family)
    assert (
        np.abs(canary_of(pristine, CANARY_LENGTH).logprobs - canary_of(published, CANARY_LENGTH).logprobs).max() > 0.01
    )
    adapter = export(run.path, folder / "adapter", form="adapter")
    for model in (merged, PeftModel.from_pretrained(pristine, adapter)):
        assert np.abs(canary_of(model.eval(), CANARY_LENGTH).logprobs - expected).max() < TOLERANCE


def copies(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def changed(policy: Policy, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in policy.named_parameters() if not torch.equal(parameter, before[name])}
