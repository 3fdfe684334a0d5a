from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.rewards.classifiers import load_classifier

pytestmark = pytest.mark.unit

CIVIL, RUDE = "thank you for the kind help", "what a dumb idiot you are"


def probabilities(folder: Path, ids: list[int]) -> np.ndarray:
    """Sigmoid or softmax over the labels for one row of token ids, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    multi = model.config.problem_type == "multi_label_classification"
    return (torch.sigmoid(logits) if multi else torch.softmax(logits, -1)).numpy()


def windows_by_hand(folder: Path, text: str, size: int, shared: int) -> list[list[int]]:
    """Rows of `size` ids with start and end token, each beginning `shared` tokens before the last one ended."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    inner = size - 2
    starts = range(0, max(1, len(ids) - shared), inner - shared)
    return [[tokenizer.cls_token_id, *ids[s : s + inner], tokenizer.sep_token_id] for s in starts]


def test_a_short_text_reads_as_score_and_toxicity_do(two_labels: Path) -> None:
    classifier = load_classifier(ClassifierConfig(name="t", kind="transformers", model=str(two_labels)), "cpu")
    texts = [CIVIL, RUDE, ""]
    readings = classifier.read(texts)
    np.testing.assert_allclose(readings.score, classifier.score(texts), atol=1e-5)
    np.testing.assert_allclose(readings.toxicity, classifier.toxicity(texts), atol=1e-6)
    np.testing.assert_allclose(readings.labels["toxic"], readings.toxicity, atol=1e-6)
    np.testing.assert_allclose(readings.labels["toxic"] + readings.labels["neutral"], 1, atol=1e-6)
    assert readings.windows.tolist() == [1, 1, 1]


@pytest.mark.parametrize("model", ["two_labels", "many_labels"])
def test_the_most_toxic_window_counts(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    config = ClassifierConfig(name="t", kind="transformers", model=str(folder), max_length=16, batch_size=3)
    classifier = load_classifier(config, "cpu")
    text = " ".join([CIVIL] * 8 + [RUDE] + [CIVIL] * 8)
    readings = classifier.read([CIVIL, text, RUDE])
    rows = windows_by_hand(folder, text, 16, 4)
    assert readings.windows.tolist() == [1, len(rows), 1]
    expected = np.max([probabilities(folder, row) for row in rows], axis=0)
    labels = classifier_labels(folder)
    assert [readings.labels[label][1] for label in labels] == pytest.approx(list(expected), abs=1e-5)
    assert readings.toxicity[1] == pytest.approx(expected[labels.index("toxic")], abs=1e-5)
    # Cut at 16 tokens the insult is never read.
    assert classifier.toxicity([text])[0] < 0.1 < 0.9 < readings.toxicity[1]


def classifier_labels(folder: Path) -> list[str]:
    id2label = AutoModelForSequenceClassification.from_pretrained(folder).config.id2label
    return [id2label[i] for i in range(len(id2label))]


def test_a_linear_classifier_reads_all_at_once() -> None:
    config = ClassifierConfig(name="words", kind="linear", model="profanity_check:predict_prob", output="logprob")
    classifier = load_classifier(config)
    texts = [CIVIL * 500, RUDE]
    readings = classifier.read(texts)
    np.testing.assert_allclose(readings.score, classifier.score(texts))
    np.testing.assert_allclose(readings.toxicity, classifier.toxicity(texts))
    assert (readings.windows.tolist(), readings.labels) == ([1, 1], {})
    assert classifier.read([]).score.shape == (0,)
