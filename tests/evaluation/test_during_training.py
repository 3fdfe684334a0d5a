"""The judge of the evaluations during training measures as the final evaluation does."""

import os
import signal
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import ray
from light_judge import LightJudge

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import SyncError
from detox_ray.evaluation.comparison import EvaluationProtocol, compare
from detox_ray.evaluation.during_training import HeldoutEvaluation, Judge
from detox_ray.evaluation.meter import score_responses
from detox_ray.evaluation.responses import group_rollouts
from detox_ray.records import Prompt, Sampling
from detox_ray.rewards.classifiers import load_classifier

JUDGE = ClassifierConfig(name="judge", kind="linear", model="profanity_check:predict_prob")


@pytest.mark.unit
@pytest.mark.parametrize(
    "texts",
    [
        [["you are a stupid idiot"], ["thank you for asking"], [""], [" "]],
        [[""], [" "]],
    ],
)
def test_the_numbers_are_those_of_the_final_table(make_rollouts, texts):
    """Of responses that end by themselves, one that was cut off at its longest, and empty ones."""
    first, *others = make_rollouts(texts)
    rollouts = [replace(first, response_ids=first.response_ids[:-1], finish_reason="length"), *others]
    line = Judge(JUDGE).judged(rollouts, first.adapter_version, 3, 0.5)
    prompts = [Prompt(r.prompt_id, r.prompt_text, ()) for r in rollouts]
    scored = score_responses(group_rollouts("tuned", rollouts, prompts, [1]), [load_classifier(JUDGE)], None)
    metrics = compare([scored], EvaluationProtocol(["judge"], 0, 10))["systems"]["tuned"]["all"]
    for name in ("mean_toxicity", "share_toxic", "mean_length"):
        assert line[name] == pytest.approx(metrics[name]["value"])
    assert line["mean_length"] == np.mean([len(r.text.split()) for r in rollouts])
    assert (line["step"], line["reward"], line["responses"]) == (3, 0.5, len(rollouts))


@pytest.mark.unit
def test_answers_of_another_adapter_are_not_the_steps(make_rollouts):
    one, other = make_rollouts([["you are a stupid idiot"], ["thank you for asking"]])
    version = one.adapter_version
    with pytest.raises(SyncError, match=f"without adapter version {version}"):
        Judge(JUDGE).judged([one, replace(other, adapter_version=version - 1)], version, 3, 0.5)


@pytest.fixture
def light_judge(local_ray, monkeypatch):
    monkeypatch.setattr("detox_ray.evaluation.during_training.Judge", LightJudge)


@pytest.mark.e2e
def test_a_judge_that_dies_or_hangs_is_asked_again(make_rollouts, light_judge):
    rollouts = Future()
    rollouts.set_result(make_rollouts([["you are a stupid idiot"], ["thank you for asking"]]))
    version = rollouts.result()[0].adapter_version
    evaluation = HeldoutEvaluation(JUDGE, [], Sampling(6), timeout_s=15)
    evaluation.judge(rollouts, version, 0, 0.5)
    [undisturbed] = evaluation.finished(until=1)
    for step, fault in ((1, signal.SIGKILL), (2, signal.SIGSTOP)):
        os.kill(ray.get(evaluation._judge.__ray_call__.remote(lambda _: os.getpid())), fault)
        evaluation.judge(rollouts, version, step, 0.5)
        assert evaluation.finished(until=step + 1) == [{**undisturbed, "step": step}]


@pytest.mark.e2e
def test_evaluations_come_in_order_and_those_behind_a_checkpoint_are_not_waited_for(make_rollouts, light_judge):
    there, to_come = Future(), Future()
    there.set_result(make_rollouts([["you are a stupid idiot"]]))
    evaluation = HeldoutEvaluation(JUDGE, [], Sampling(6), timeout_s=60)
    for step, rollouts in ((3, there), (7, there), (11, to_come)):
        evaluation.judge(rollouts, there.result()[0].adapter_version, step, 0.5)
    assert [line["step"] for line in evaluation.finished(until=8)] == [3, 7]
    assert evaluation.finished(until=0) == []
    to_come.set_exception(SyncError("responses that nobody sent"))
    with pytest.raises(SyncError, match="nobody sent"):
        evaluation.finished(until=12)
