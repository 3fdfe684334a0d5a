"""A step that must be rejected: what is noticed, what is gone back to, and when the run stops."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import Config, PolicyConfig, RewardConfig
from detox_ray.errors import DivergenceError, StorageError
from detox_ray.learner.checkpoint_folder import write_checkpoint
from detox_ray.learner.checkpoints import resume
from detox_ray.learner.ppo import PPO, SamplingDistribution
from detox_ray.learner.recovery import Recovery, _copied, refuse_collapsed
from detox_ray.learner.train_loop import LearnerTask, healthy_step
from detox_ray.learner_config import TrainConfig
from detox_ray.metrics_file import ADAPTER_FOLDER, CHECKPOINT_FOLDER, REJECTED_FILE, STEPS_FILE
from detox_ray.policy.adapter import Adapter, load_adapter
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import collate
from detox_ray.ppo_config import DivergenceConfig, PPOConfig
from detox_ray.records import Batch, Canary, Rollout

pytestmark = pytest.mark.unit


class OwnPolicyStream:
    """A stream whose responses are random tokens with the log-probabilities of the learner's own policy."""

    def __init__(self, policy: Policy, bad_steps: dict[int, int]) -> None:
        """`bad_steps`: step -> how often its responses are all empty."""
        self.policy = policy
        self.bad_steps = bad_steps
        self.published: list[Adapter] = []
        self.discarded = 0

    def next_batch(self, step: int, last_step: int) -> Batch:
        rng = np.random.default_rng(step)
        prompts, responses = (list(rng.integers(2, 96, (8, length))) for length in (4, 6))
        with torch.no_grad():
            logprobs = self.policy(collate(prompts, responses, 1)).logprobs.numpy()
        bad = self.bad_steps.get(step, 0) > 0
        self.bad_steps[step] = self.bad_steps.get(step, 0) - 1
        texts = ["" if bad else str(i) for i in range(8)]
        rollouts = [
            Rollout(str(i), "", p, r, row, text, "stop", 0)
            for i, (p, r, row, text) in enumerate(zip(prompts, responses, logprobs, texts, strict=True))
        ]
        metrics = {"reward": 0.0, "time_acknowledge_s": 0.0}
        return Batch(rollouts, rng.normal(size=8).astype(np.float32), staleness=0, metrics=metrics)

    def publish(self, make_adapter: Callable[[int], Adapter], canary: Canary) -> int:
        self.published.append(make_adapter(len(self.published)))
        return len(self.published) - 1

    def discard(self) -> int:
        self.discarded += 1
        return 2


def learner(model: str, **divergence: Any) -> PPO:
    config = PPOConfig(
        batch_size=8, epochs=1, minibatches=2, learning_rate=1e-2, divergence=DivergenceConfig(**divergence)
    )
    policy = Policy(PolicyConfig(model=model, quantization="none"), torch.device("cpu"))
    return PPO(policy, config, SamplingDistribution(1.0, (), 1, 1e-3), pad_id=1, total_steps=10, seed=0)


def run(
    ppo: PPO, folder: Path, steps: int, bad_steps: dict[int, int]
) -> tuple[OwnPolicyStream, list[dict[str, float]]]:
    stream: Any = OwnPolicyStream(ppo.policy, bad_steps)
    classifier = ClassifierConfig(name="other", kind="linear", model="other:toxicity")
    config = Config(ppo=ppo.config, reward=RewardConfig(classifiers=[classifier]), train=TrainConfig(total_steps=steps))
    task = LearnerTask(config, str(folder), stream, (0,), 1, 20)
    recovery = Recovery(ppo, folder)
    return stream, [healthy_step(task, ppo, recovery, step) for step in range(steps)]


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / REJECTED_FILE).read_text().splitlines()]


def test_a_collapsed_batch_gives_up_the_adapter_that_sampled_it(tiny_model: str, tmp_path: Path) -> None:
    ppo = learner(tiny_model)
    stream, lines = run(ppo, tmp_path, 4, {2: 1})
    assert [line["rejected"] for line in lines] == [0, 0, 1, 0]
    assert stream.discarded == 1
    assert [line["dropped_batches"] for line in lines] == [0, 0, 1 + 2, 0]
    # Published after the steps 0, 1, the roll-back, 2, 3: what is gone back to is what sampled step 1's good batch.
    digests = [adapter.tensors for adapter in stream.published]
    same = [all(np.array_equal(digests[2][n], old[n]) for n in old) for old in digests[:2]]
    assert same == [True, False]
    assert lines[3]["learning_rate"] == pytest.approx(0.3 * lines[1]["learning_rate"])
    assert [(line["step"], line["stopped"]) for line in rejected(tmp_path)] == [(2, False)]


def test_the_second_rejection_stops_the_run_with_the_evidence(tiny_model: str, tmp_path: Path) -> None:
    ppo = learner(tiny_model)
    with pytest.raises(DivergenceError, match=r"step 2: 8 of 8 responses are empty .* roll-back .* x 0\.3"):
        run(ppo, tmp_path, 3, {1: 2})
    assert [(line["step"], line["stopped"]) for line in rejected(tmp_path)] == [(1, False), (1, True)]
    assert all("responses are empty" in line["reason"] for line in rejected(tmp_path))
    # The last good one is the untrained one, which sampled step 0.
    left = load_adapter(tmp_path / ADAPTER_FOLDER)
    assert not any(tensor.any() for name, tensor in left.tensors.items() if "lora_B" in name)
    assert (tmp_path / ADAPTER_FOLDER / STEPS_FILE).read_text() == "0"


def test_what_was_given_up_is_not_the_last_good_one_when_the_next_step_is_bad_too(
    tiny_model: str, tmp_path: Path
) -> None:
    with pytest.raises(DivergenceError, match="of 0 steps"):
        run(learner(tiny_model), tmp_path, 3, {1: 1, 2: 1})
    assert [line["step"] for line in rejected(tmp_path)] == [1, 2]


def test_a_continued_run_goes_back_to_where_it_would_have_gone_back(tiny_model: str, tmp_path: Path) -> None:
    """Its only checkpoint was made by what the next step gives up."""
    ppo = learner(tiny_model)
    recovery = Recovery(ppo, tmp_path)
    good = []
    for step in range(3):
        recovery.begin_step(step)
        good.append((ppo.policy.adapter().digest, _copied(ppo.state())))
        batch = OwnPolicyStream(ppo.policy, {}).next_batch(step, 9)
        ppo.update(batch.rollouts, batch.rewards, step, on_policy=True)
        recovery.step_is_good()
    (folder := tmp_path / CHECKPOINT_FOLDER / "checkpoint_0").mkdir(parents=True)
    write_checkpoint(folder, 2, recovery.policy.adapter(), recovery.state())

    ppo = learner(tiny_model)
    recovery = Recovery(ppo, tmp_path)
    assert resume(recovery, tmp_path / CHECKPOINT_FOLDER) == 3
    digest, state = good[-1]
    assert load_adapter(folder / ADAPTER_FOLDER).digest == ppo.policy.adapter().digest != digest
    recovery.begin_step(3)
    recovery.roll_back(3, DivergenceError("any"))
    assert ppo.policy.adapter().digest == digest
    assert ppo.rate_scale == 0.3
    found = ppo.state()
    for name, tensor in state["value_head"].items():
        assert torch.equal(found["value_head"][name], tensor)
    for parameter, kept in state["optimizer"]["state"].items():
        assert torch.equal(found["optimizer"]["state"][parameter]["exp_avg"], kept["exp_avg"])
        assert found["optimizer"]["state"][parameter]["step"] == kept["step"] > 0


def test_a_checkpoint_of_an_earlier_version_says_so(tiny_model: str, tmp_path: Path) -> None:
    ppo = learner(tiny_model)
    with pytest.raises(StorageError, match="of an earlier version"):
        Recovery(ppo, tmp_path).load_state(ppo.state())


@pytest.mark.parametrize("rewards", [[np.nan] * 8, [1e30, -1e30] * 4])
def test_a_loss_that_is_no_number_or_explodes_is_rejected_and_undone(
    tiny_model: str, tmp_path: Path, rewards: list[float]
) -> None:
    ppo = learner(tiny_model)
    recovery = Recovery(ppo, tmp_path)
    before = ppo.policy.adapter(0).tensors
    stream = OwnPolicyStream(ppo.policy, {})
    with pytest.raises(DivergenceError, match=r"value loss (nan|inf|[0-9.]+e\+\d+)") as problem:
        ppo.update(stream.next_batch(0, 1).rollouts, np.array(rewards, dtype=np.float32), 0, on_policy=True)
    recovery.roll_back(0, problem.value)
    after = ppo.policy.adapter(0).tensors
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert ppo.rate_scale == 0.3
    assert np.isfinite(ppo.update(stream.next_batch(0, 1).rollouts, np.arange(8.0), 0, on_policy=True)["value_loss"])


def test_a_policy_far_from_the_reference_is_rejected(tiny_model: str, tmp_path: Path) -> None:
    ppo = learner(tiny_model, max_kl_per_token=0.5)
    with torch.no_grad():
        for name, parameter in ppo.policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 1.0)
    # Tokens that the policy finds likely and the reference does not.
    prompt = np.arange(5, 9)
    with torch.no_grad():
        answers = [
            ppo.policy(collate([prompt], [np.array([token])], 1)).logprobs[0, 0].item() for token in range(2, 96)
        ]
    likely = 2 + int(np.argmax(answers))
    rollouts = [
        Rollout(str(i), "", prompt, np.array([likely]), np.array([max(answers)], np.float32), str(i), "stop", 0)
        for i in range(8)
    ]
    with pytest.raises(
        DivergenceError, match=r"nats per token from the reference \(ppo.divergence.max_kl_per_token=0.5"
    ):
        ppo.update(rollouts, np.zeros(8, np.float32), 0, on_policy=True)


def test_the_scale_of_the_rates_is_part_of_a_checkpoint(tiny_model: str, tmp_path: Path) -> None:
    ppo, other = learner(tiny_model), learner(tiny_model)
    Recovery(ppo, tmp_path).roll_back(0, DivergenceError("any"))
    other.load_state(ppo.state())
    assert other.rate_scale == 0.3


@pytest.mark.parametrize(
    ("texts", "refused"), [(["a"] * 9 + ["b"], True), (["a"] * 8 + ["b", "c"], False), (["a"], False)]
)
def test_how_many_equal_responses_are_a_collapse(texts: list[str], refused: bool) -> None:
    nothing = np.zeros(0)
    rollouts = [Rollout("", "", nothing, nothing, nothing, f" {text}\n", "stop", 0) for text in texts]
    if not refused:
        refuse_collapsed(rollouts, DivergenceConfig())
        return
    with pytest.raises(DivergenceError, match=r"9 of 10 responses are one and the same text"):
        refuse_collapsed(rollouts, DivergenceConfig())
