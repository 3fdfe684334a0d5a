import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.feature_extraction.text import HashingVectorizer

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import ConfigError, ModelError, RewardError
from detox_ray.rewards.classifiers import check_classifier, load_classifier, read_label
from detox_ray.rewards.probability import PROBABILITY_FLOOR

pytestmark = pytest.mark.unit

CIVIL, RUDE = "thank you for the kind help", "you are a stupid idiot"
TEXTS = [RUDE, "", CIVIL, "that is a good idea " * 20, "shut up", "unknown words entirely", "fool"]
OUTPUTS = ["logit", "logprob", "probability"]
MINILM = Path(__file__).resolve().parents[3] / "shared" / "models" / "minilm-toxicity"


def transformers_config(folder: Path, **changes) -> ClassifierConfig:
    return ClassifierConfig(**{"name": "tiny", "kind": "transformers", "model": str(folder), **changes})


def linear_config(model: str, **changes) -> ClassifierConfig:
    return ClassifierConfig(**{"name": "linear", "kind": "linear", "model": model, **changes})


def pipeline_probabilities(folder: Path, texts: list[str]) -> list[dict[str, float]]:
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(folder), top_k=None, device="cpu")
    results = classify(texts, truncation=True, max_length=32)
    return [{r["label"]: r["score"] for r in result} for result in results]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("meaning", [("toxic", "toxic"), ("neutral", "nontoxic"), (1, "toxic"), (0, "nontoxic")])
def test_rude_text_scores_lower_whatever_the_label_means(two_labels: Path, output: str, meaning: tuple) -> None:
    label, label_means = meaning
    classifier = load_classifier(transformers_config(two_labels, label=label, label_means=label_means, output=output))
    rude, civil = classifier.score([RUDE, CIVIL])
    assert rude < civil - 0.1
    toxicity = classifier.toxicity([RUDE, CIVIL])
    assert toxicity[0] > 0.5 > toxicity[1]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", ["many_labels", "one_label"])
def test_multi_label_and_single_logit_models(kind: str, output: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    classifier = load_classifier(transformers_config(folder, label="toxic", output=output))
    rude, civil = classifier.score([RUDE, CIVIL])
    assert rude < civil - 0.1
    if kind == "many_labels":
        polite = load_classifier(transformers_config(folder, label="polite", label_means="nontoxic", output=output))
        rude, civil = polite.score([RUDE, CIVIL])
        assert rude < civil - 0.1


@pytest.mark.parametrize("kind", ["two_labels", "many_labels", "one_label"])
def test_probabilities_are_those_of_the_transformers_pipeline(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    classifier = load_classifier(transformers_config(folder, output="probability", batch_size=3))
    expected = np.array([result["toxic"] for result in pipeline_probabilities(folder, TEXTS)])
    np.testing.assert_allclose(classifier.toxicity(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(classifier.score(TEXTS), 1 - expected, atol=1e-5)


@pytest.mark.parametrize("output", OUTPUTS)
def test_scores_do_not_depend_on_batch_or_order(two_labels: Path, output: str) -> None:
    classifier = load_classifier(transformers_config(two_labels, output=output, batch_size=4))
    together = classifier.score(TEXTS)
    assert together.dtype == np.float32
    assert together.shape == (len(TEXTS),)
    one_by_one = np.concatenate([classifier.score([text]) for text in TEXTS])
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    np.testing.assert_allclose(together, classifier.score(TEXTS[::-1])[::-1], atol=1e-5)


def test_nothing_to_score(two_labels: Path) -> None:
    for config in (transformers_config(two_labels), linear_config("profanity_check:predict_prob")):
        assert load_classifier(config).score([]).shape == (0,)
        assert load_classifier(config).toxicity([]).shape == (0,)


def save_gpt2_classifier(folder: Path, pad_token: str | None) -> Path:
    """GPT-2 style: no start or end token around a text, so an empty text has no tokens at all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, "fool": 2, "friend": 3}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    config = GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=2, n_positions=32, num_labels=2)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token=pad_token).save_pretrained(folder)
    return folder


def test_a_model_that_reads_nothing_of_an_empty_text(tmp_path: Path) -> None:
    save_gpt2_classifier(tmp_path, pad_token="<pad>")
    classifier = load_classifier(transformers_config(tmp_path, label=1, output="probability"))
    texts = ["", "friend", "friend fool fool"]
    together = classifier.score(texts)
    np.testing.assert_allclose(together, np.concatenate([classifier.score([t]) for t in texts]), atol=1e-5)


def test_texts_beyond_the_model_are_cut(two_labels: Path) -> None:
    classifier = load_classifier(transformers_config(two_labels, max_length=256))
    np.testing.assert_allclose(classifier.score(["idiot " * 100]), classifier.score(["idiot " * 30]), atol=1e-5)


def test_label_values_worked_by_hand() -> None:
    logits = np.array([[1.0, 3.0]])
    p = np.exp(3.0) / (np.exp(1.0) + np.exp(3.0))
    assert read_label(logits, 1, False, toxic=True, output="logit") == pytest.approx([-3.0])
    assert read_label(logits, 1, False, toxic=True, output="probability") == pytest.approx([1 - p])
    assert read_label(logits, 1, False, toxic=True, output="logprob") == pytest.approx([np.log(1 - p)])
    assert read_label(logits, 1, False, toxic=False, output="logprob") == pytest.approx([np.log(p)])
    sigmoid = 1 / (1 + np.exp(-3.0))
    assert read_label(logits, 1, True, toxic=True, output="probability") == pytest.approx([1 - sigmoid])


@pytest.mark.parametrize("independent", [True, False])
def test_log_probabilities_stay_finite_where_one_minus_p_rounds_to_zero(independent: bool) -> None:
    logits = np.array([[-100.0, 100.0]])
    assert read_label(logits, 1, independent, toxic=True, output="logprob") == pytest.approx(
        [-100.0] if independent else [-200.0]
    )


def test_unknown_label_lists_the_labels(two_labels: Path) -> None:
    for label in ("rude", 2, -1):
        config = transformers_config(two_labels, label=label)
        with pytest.raises(ConfigError, match=r"'tiny'.*0=neutral, 1=toxic"):
            check_classifier(config)
        with pytest.raises(ConfigError, match=r"0=neutral, 1=toxic"):
            load_classifier(config)


def test_missing_models(tmp_path: Path, two_labels: Path) -> None:
    for load in (check_classifier, load_classifier):
        with pytest.raises(ModelError, match="does not exist"):
            load(transformers_config(tmp_path / "absent"))
        with pytest.raises(ModelError, match=r"config\.json"):
            load(transformers_config(tmp_path))
    (tmp_path / "config.json").write_text((two_labels / "config.json").read_text())
    with pytest.raises(ModelError, match="safetensors"):
        check_classifier(transformers_config(tmp_path))
    weights = (two_labels / "model.safetensors").read_bytes()
    for damaged in (weights[:-1], b"not weights"):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged .*; copy or save it again"):
            check_classifier(transformers_config(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(weights)
    check_classifier(transformers_config(tmp_path))


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path, two_labels: Path) -> None:
    """transformers itself would draw the missing weights at random and only warn."""
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(two_labels).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(two_labels).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"classifier\.(bias|weight)"):
        load_classifier(transformers_config(tmp_path, label=1))


def test_tokenizer_without_pad_token(tmp_path: Path) -> None:
    save_gpt2_classifier(tmp_path, pad_token=None)
    with pytest.raises(ModelError, match="pad token"):
        load_classifier(transformers_config(tmp_path, label=1))


def test_weights_that_are_not_numbers(tmp_path: Path, two_labels: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(two_labels)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(two_labels).save_pretrained(tmp_path)
    classifier = load_classifier(transformers_config(tmp_path))
    for method in (classifier.score, classifier.toxicity):
        with pytest.raises(RewardError, match=r"'tiny'.*not finite"):
            method([CIVIL])


@pytest.mark.parametrize("output", OUTPUTS)
def test_alt_profanity_check(output: str) -> None:
    from profanity_check import predict_prob

    config = linear_config("profanity_check:predict_prob", output=output)
    check_classifier(config)
    classifier = load_classifier(config)
    rude, empty, civil = classifier.score([RUDE, "", CIVIL])
    assert rude < civil
    assert np.isfinite(empty)
    p = predict_prob([RUDE, CIVIL])
    np.testing.assert_allclose(classifier.toxicity([RUDE, CIVIL]), p, atol=1e-6)
    p = np.minimum(p, 1 - PROBABILITY_FLOOR)
    expected = {"probability": 1 - p, "logprob": np.log(1 - p), "logit": np.log((1 - p) / p)}[output]
    np.testing.assert_allclose(classifier.score([RUDE, CIVIL]), expected, rtol=1e-5, atol=1e-5)


def test_linear_that_reports_the_civil_probability_is_turned_round() -> None:
    toxic = load_classifier(linear_config("profanity_check:predict_prob", output="probability"))
    nontoxic = load_classifier(
        linear_config("profanity_check:predict_prob", output="probability", label_means="nontoxic")
    )
    np.testing.assert_allclose(toxic.score([RUDE]), 1 - nontoxic.score([RUDE]), atol=1e-6)


def test_an_object_with_predict_proba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    classifier = load_classifier(linear_config("faulty_probabilities:estimator", output="probability"))
    np.testing.assert_allclose(classifier.score([RUDE, CIVIL]), [0.1, 0.9], atol=1e-6)


@pytest.mark.parametrize(
    ("function", "message"), [("too_large", "1.5"), ("too_few", "1 probability|shape"), ("not_finite", "not finite")]
)
def test_results_that_are_not_probabilities(function: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    classifier = load_classifier(linear_config(f"faulty_probabilities:{function}"))
    with pytest.raises(RewardError, match=message) as error:
        classifier.score([RUDE, CIVIL])
    assert "'linear'" in str(error.value)


def test_import_paths_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for load in (check_classifier, load_classifier):
        for path in ("no_such_module:f", "profanity_check:no_such_function", "faulty_probabilities:not_a_function"):
            with pytest.raises(ConfigError, match=path):
                load(linear_config(path))
        with pytest.raises(ModelError, match="neither a folder nor an import path"):
            load(linear_config("no/such/folder"))


@pytest.fixture
def hashed_linear(tmp_path: Path) -> Path:
    """The lab's format, with weights from a fit of scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from tiny_classifier import CIVIL as CIVIL_TEXTS
    from tiny_classifier import RUDE as RUDE_TEXTS

    settings = {"n_features": 2**12, "ngram_range": [1, 2], "lowercase": True, "alternate_sign": False, "norm": "l2"}
    vectorizer = HashingVectorizer(**{**settings, "ngram_range": (1, 2)})
    model = LogisticRegression(C=10).fit(vectorizer.transform(CIVIL_TEXTS + RUDE_TEXTS), [0] * 5 + [1] * 5)
    (tmp_path / "linear.json").write_text(json.dumps(settings))
    save_file(
        {"coef": model.coef_[0].astype(np.float32), "intercept": model.intercept_.astype(np.float32)},
        tmp_path / "linear.safetensors",
    )
    expected = model.predict_proba(vectorizer.transform([RUDE, "", CIVIL]))[:, 1]
    np.save(tmp_path / "expected.npy", expected)
    return tmp_path


def test_hashed_linear_folder(hashed_linear: Path) -> None:
    config = linear_config(str(hashed_linear))
    check_classifier(config)
    classifier = load_classifier(config)
    np.testing.assert_allclose(
        classifier.toxicity([RUDE, "", CIVIL]), np.load(hashed_linear / "expected.npy"), atol=1e-5
    )
    rude, _, civil = classifier.score([RUDE, "", CIVIL])
    assert rude < 0 < civil


def test_broken_hashed_linear_folders(hashed_linear: Path) -> None:
    config = linear_config(str(hashed_linear))
    settings = json.loads((hashed_linear / "linear.json").read_text())
    (hashed_linear / "linear.json").write_text(json.dumps({**settings, "n_features": 2**10}))
    with pytest.raises(ModelError, match="expected"):
        load_classifier(config)
    (hashed_linear / "linear.json").write_text(json.dumps({**settings, "preprocessor": "eval"}))
    with pytest.raises(ModelError, match="preprocessor"):
        check_classifier(config)
    (hashed_linear / "linear.safetensors").unlink()
    with pytest.raises(ModelError, match=r"linear\.safetensors"):
        check_classifier(config)


@pytest.mark.skipif(not MINILM.is_dir(), reason="no shared models beside the repository")
@pytest.mark.parametrize(
    "meaning", [{"label": "toxic"}, {"label": "neutral", "label_means": "nontoxic"}], ids=["toxic", "neutral"]
)
def test_a_classifier_of_the_field(meaning: dict) -> None:
    for output in OUTPUTS:
        classifier = load_classifier(transformers_config(MINILM, output=output, **meaning))
        rude, civil = classifier.score(["you stupid idiot, shut up", "thank you, that was kind of you"])
        assert rude < civil - 0.3


def test_temperature_divides_the_logits(two_labels: Path) -> None:
    texts = ["you fool", "a fine day"]
    for config in (
        ClassifierConfig(name="t", kind="transformers", model=str(two_labels), label=1, output="logit"),
        ClassifierConfig(name="l", kind="linear", model="profanity_check:predict_prob", output="logit"),
    ):
        plain = load_classifier(config).score(texts)
        softened = load_classifier(config.model_copy(update={"temperature": 2.0})).score(texts)
        assert softened == pytest.approx(plain / 2, abs=1e-4)
