"""The judge of the evaluations during training measures as the final evaluation does."""

from dataclasses import replace

import numpy as np
import pytest

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import SyncError
from detox_ray.evaluation.comparison import Protocol, compare
from detox_ray.evaluation.during_training import Judge
from detox_ray.evaluation.meter import score_responses
from detox_ray.evaluation.responses import group_rollouts
from detox_ray.records import Prompt
from detox_ray.rewards.classifiers import load_classifier

pytestmark = pytest.mark.unit
JUDGE = ClassifierConfig(name="judge", kind="linear", model="profanity_check:predict_prob")


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
    line = Judge(JUDGE).judged(3, 0.5, first.adapter_version, rollouts[:1], rollouts[1:])
    prompts = [Prompt(r.prompt_id, r.prompt_text, ()) for r in rollouts]
    scored = score_responses(group_rollouts("tuned", rollouts, prompts, [1]), [load_classifier(JUDGE)], None)
    metrics = compare([scored], Protocol(["judge"], 0, 10))["systems"]["tuned"]["all"]
    for name in ("mean_toxicity", "share_toxic", "mean_length"):
        assert line[name] == pytest.approx(metrics[name]["value"])
    assert line["mean_length"] == np.mean([len(r.text.split()) for r in rollouts])
    assert (line["step"], line["reward"], line["responses"]) == (3, 0.5, len(rollouts))


def test_answers_of_another_adapter_are_not_the_steps(make_rollouts):
    one, other = make_rollouts([["you are a stupid idiot"], ["thank you for asking"]])
    version = one.adapter_version
    with pytest.raises(SyncError, match=f"without adapter version {version}"):
        Judge(JUDGE).judged(3, 0.5, version, [one], [replace(other, adapter_version=version - 1)])
