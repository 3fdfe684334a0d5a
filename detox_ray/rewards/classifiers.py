"""Toxicity classifiers: texts in, scores out, signed so that less toxic is always higher."""

import importlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from detox_ray.config import ClassifierConfig
from detox_ray.errors import ConfigError, ModelError, RewardError
from detox_ray.records import Readings

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
LINEAR_SETTINGS = {"n_features", "ngram_range", "lowercase", "alternate_sign", "norm", "analyzer"}
# A float32 logit is finite for probabilities inside these bounds, and no farther out than +-13.8.
PROBABILITY_FLOOR = 1e-6
# Windows of a long text share a quarter of their tokens, so that what one cuts in two another holds whole.
WINDOW_OVERLAP = 4

Output = Literal["logit", "logprob", "probability"]


class Classifier(Protocol):
    """What scores texts; neither method depends on the order or the grouping of the texts."""

    name: str

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """`[N] float32`, less toxic is higher, in the form `output` names; raises RewardError if one is not finite."""

    def toxicity(self, texts: Sequence[str]) -> np.ndarray:
        """`[N] float32` in [0, 1]: the probability of toxicity, whatever `output` is; raises RewardError as `score`."""

    def read(self, texts: Sequence[str]) -> Readings:
        """Both and every label, of texts of any length (`score` and `toxicity` cut them at `max_length` tokens)."""


def load_classifier(config: ClassifierConfig, device: str | None = None) -> Classifier:
    """The classifier that `config` describes, with its weights, on `device` (none: a GPU where there is one).

    Raises:
        ConfigError: the label does not exist, or the import path cannot be imported.
        ModelError: the model is missing, has no safetensors weights, no trained head or no pad token.
    """
    if config.kind == "transformers":
        return TransformersClassifier(config, device)
    return LinearClassifier(config)


def check_classifier(config: ClassifierConfig) -> None:
    """Raises what `load_classifier` would raise, as far as that can be known without loading weights.

    Raises:
        ConfigError, ModelError: as `load_classifier`.
    """
    if config.kind == "linear":
        if Path(config.model).is_dir():
            _linear_settings(config)
        else:
            _import_probability(config)
        return
    model_config = _load_model_config(config)
    _label_index(config, model_config.id2label)
    folder = Path(config.model)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"classifier {config.name!r}: no *.safetensors in {config.model}; save the model with safe serialization"
        )


class TransformersClassifier:
    """A sequence classifier of transformers, read at one label."""

    def __init__(self, config: ClassifierConfig, device: str | None = None) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.name = config.name
        self._config = config
        model_config = _load_model_config(config)
        self._label = _label_index(config, model_config.id2label)
        # As the text-classification pipeline of transformers decides it.
        self._independent_labels = (
            model_config.problem_type == "multi_label_classification" or model_config.num_labels == 1
        )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                config.model, revision=config.revision, trust_remote_code=False
            )
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                config.model,
                revision=config.revision,
                config=model_config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"classifier {config.name!r}: cannot load {config.model!r}: {_first_line(error)}; "
                "give a folder or hub id with a tokenizer and safetensors weights"
            ) from error
        if loading["missing_keys"]:
            raise ModelError(
                f"classifier {config.name!r}: {config.model!r} has no trained weights for "
                f"{', '.join(sorted(loading['missing_keys'])[:3])}; give a model trained for sequence classification"
            )
        if self._tokenizer.pad_token_id is None:
            raise ModelError(
                f"classifier {config.name!r}: the tokenizer of {config.model!r} has no pad token; "
                "set tokenizer.pad_token and save it beside the model"
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._tokenizer.pad_token_id
        self._tokenizer.padding_side = "right"
        self._tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        self._max_length = min(
            config.max_length,
            self._tokenizer.model_max_length,
            getattr(model_config, "max_position_embeddings", None) or config.max_length,
        )
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """See `Classifier.score`."""
        scores = read_label(
            self._logits(texts),
            self._label,
            self._independent_labels,
            toxic=self._config.label_means == "toxic",
            output=self._config.output,
        )
        return scores.astype(np.float32)

    def toxicity(self, texts: Sequence[str]) -> np.ndarray:
        """See `Classifier.toxicity`."""
        nontoxic = read_label(
            self._logits(texts),
            self._label,
            self._independent_labels,
            toxic=self._config.label_means == "toxic",
            output="probability",
        )
        return (1.0 - nontoxic).astype(np.float32)

    def read(self, texts: Sequence[str]) -> Readings:
        """Score, toxicity and every label of texts of any length, in overlapping windows of `max_length` tokens.

        Raises:
            RewardError: as `Classifier.score`.
        """
        if not texts:
            return Readings(np.zeros(0), np.zeros(0), {}, np.zeros(0, dtype=np.int64))
        encoded = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=self._max_length,
            stride=self._max_length // WINDOW_OVERLAP,
            return_overflowing_tokens=True,
        )
        owner = np.array(encoded.pop("overflow_to_sample_mapping"))
        logits = self._forward(encoded)
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        toxic = self._config.label_means == "toxic"

        def of_label(label: int, toxic: bool, output: Output) -> np.ndarray:
            return read_label(logits, label, self._independent_labels, toxic=toxic, output=output)

        score = of_label(self._label, toxic, self._config.output)
        toxicity = 1.0 - of_label(self._label, toxic, "probability")
        labels = {
            name: np.maximum.reduceat(of_label(int(index), False, "probability"), first).astype(np.float32)
            for index, name in self._model.config.id2label.items()
        }
        return Readings(
            score=np.minimum.reduceat(score, first).astype(np.float32),
            toxicity=np.maximum.reduceat(toxicity, first).astype(np.float32),
            labels=labels,
            windows=np.bincount(owner),
        )

    def _logits(self, texts: Sequence[str]) -> np.ndarray:
        """`[N, labels] float64`, in the order of `texts`; batches hold texts of similar length."""
        if not texts:
            return np.zeros((0, self._model.config.num_labels))
        return self._forward(self._tokenizer(list(texts), truncation=True, max_length=self._max_length))

    def _forward(self, encoded: Any) -> np.ndarray:
        """`[rows, labels] float64` of the rows of token ids in `encoded`, in their order."""
        import torch

        for key in encoded:
            # A tokenizer without start and end tokens makes nothing of an empty text, and a model cannot read nothing.
            filler = self._empty_token_id if key == "input_ids" else (1 if key == "attention_mask" else 0)
            encoded[key] = [row or [filler] for row in encoded[key]]
        lengths = [len(row) for row in encoded["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        logits = np.empty((len(lengths), self._model.config.num_labels))
        with torch.inference_mode():
            for start in range(0, len(order), self._config.batch_size):
                rows = order[start : start + self._config.batch_size]
                batch = self._tokenizer.pad(
                    {key: [values[i] for i in rows] for key, values in encoded.items()}, return_tensors="pt"
                ).to(self._device)
                logits[rows] = self._model(**batch).logits.double().cpu().numpy()
        return _finite(self.name, logits) / self._config.temperature

    @property
    def _empty_token_id(self) -> int:
        tokenizer = self._tokenizer
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return next(token for token in candidates if token is not None)


class LinearClassifier:
    """A function of texts that returns probabilities, or the lab's hashed linear model; on the CPU."""

    def __init__(self, config: ClassifierConfig) -> None:
        self.name = config.name
        self._config = config
        self._probability = _load_linear(config) if Path(config.model).is_dir() else _import_probability(config)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """See `Classifier.score`."""
        return self._score(self._toxicity(texts))

    def toxicity(self, texts: Sequence[str]) -> np.ndarray:
        """See `Classifier.toxicity`."""
        return self._toxicity(texts).astype(np.float32)

    def read(self, texts: Sequence[str]) -> Readings:
        """Score and toxicity of texts of any length; raises RewardError as `Classifier.score`."""
        toxicity = self._toxicity(texts)
        windows = np.ones(len(texts), dtype=np.int64)
        return Readings(self._score(toxicity), toxicity.astype(np.float32), labels={}, windows=windows)

    def _score(self, toxicity: np.ndarray) -> np.ndarray:
        """`[N] float32` from probabilities `[N]`."""
        nontoxic = 1.0 - toxicity
        if self._config.output != "probability":
            nontoxic = np.clip(nontoxic, PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)
            nontoxic = np.log(nontoxic) - (np.log1p(-nontoxic) if self._config.output == "logit" else 0.0)
        return nontoxic.astype(np.float32)

    def _toxicity(self, texts: Sequence[str]) -> np.ndarray:
        """`[N] float64`."""
        if not texts:
            return np.zeros(0)
        values = np.asarray(self._probability(list(texts)), dtype=np.float64)
        if values.shape != (len(texts),):
            raise RewardError(
                f"classifier {self.name!r} returned an array of shape {values.shape} for {len(texts)} texts; "
                f"{self._config.model} must return one probability a text"
            )
        _finite(self.name, values)
        if values.min() < 0 or values.max() > 1:
            outside = values[(values < 0) | (values > 1)][0]
            raise RewardError(
                f"classifier {self.name!r} returned {outside:.4g}, which is not a probability; "
                f"{self._config.model} must return values in [0, 1]"
            )
        if self._config.temperature != 1.0:
            odds = np.clip(values, PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)
            values = 1.0 / (1.0 + ((1.0 - odds) / odds) ** (1.0 / self._config.temperature))
        return values if self._config.label_means == "toxic" else 1.0 - values


def read_label(logits: np.ndarray, label: int, independent_labels: bool, *, toxic: bool, output: Output) -> np.ndarray:
    """The value of one label, signed so that less toxic is higher.

    `logits: [N, L]`; `independent_labels` says sigmoid (multi-label) rather than softmax. When the label means toxic,
    the result is the value of its opposite: -logit, 1 - p or log(1 - p). Returns `[N]`.
    """
    logit = logits[:, label]
    if output == "logit":
        return -logit if toxic else logit
    if independent_labels:
        log_probability = -np.logaddexp(0.0, logit if toxic else -logit)
    else:
        others = np.delete(logits, label, axis=1)
        kept = np.logaddexp.reduce(others, axis=1) if toxic else logit
        log_probability = kept - np.logaddexp.reduce(logits, axis=1)
    return log_probability if output == "logprob" else np.exp(log_probability)


def _load_model_config(config: ClassifierConfig) -> Any:
    """The model's own configuration, from the folder or the hub."""
    from transformers import AutoConfig

    where = f"classifier {config.name!r}: {config.model!r}"
    folder = Path(config.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{where} has no config.json; give the folder that save_pretrained wrote")
    elif not HUB_ID.fullmatch(config.model):
        raise ModelError(f"{where} does not exist; give the folder of a sequence classifier, or its hub id")
    try:
        return AutoConfig.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{where} cannot be read: {_first_line(error)}; give a local folder or an existing hub id"
        ) from None


def _label_index(config: ClassifierConfig, id2label: dict[int, str]) -> int:
    names = {int(index): name for index, name in id2label.items()}
    if config.label in names:
        return int(config.label)
    for index, name in names.items():
        if name == config.label:
            return index
    listed = ", ".join(f"{index}={name}" for index, name in sorted(names.items()))
    raise ConfigError(
        f"classifier {config.name!r}: {config.model!r} has no label {config.label!r}; its labels: {listed}"
    )


def _import_probability(config: ClassifierConfig) -> Callable[[list[str]], Any]:
    """The function at `package.module:function`; of an object with `predict_proba`, its second column."""
    where = f"classifier {config.name!r}: {config.model!r}"
    if not IMPORT_PATH.fullmatch(config.model):
        raise ModelError(f"{where} is neither a folder nor an import path; write package.module:function")
    module_name, _, attribute = config.model.partition(":")
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where} cannot be imported: {_first_line(error)}; is its package installed?") from None
    if hasattr(target, "predict_proba"):
        return lambda texts: np.asarray(target.predict_proba(texts))[:, 1]
    if not callable(target):
        raise ConfigError(
            f"{where} is not callable; name a function of a list of texts, or an object with predict_proba"
        )
    return target


def _linear_settings(config: ClassifierConfig) -> dict[str, Any]:
    """The vectorizer settings in `linear.json`, checked."""
    path = Path(config.model) / "linear.json"
    where = f"classifier {config.name!r}: {path}"
    if not path.with_suffix(".safetensors").is_file():
        raise ModelError(f"{where.removesuffix('.json')}.safetensors does not exist; make the model again")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{where} cannot be read: {_first_line(error)}; make the model again") from None
    if unknown := set(settings) - LINEAR_SETTINGS:
        raise ModelError(f"{where} has unknown settings {sorted(unknown)}; known: {', '.join(sorted(LINEAR_SETTINGS))}")
    settings["ngram_range"] = tuple(settings.get("ngram_range", (1, 1)))
    return settings


def _load_linear(config: ClassifierConfig) -> Callable[[list[str]], np.ndarray]:
    """P(toxic) = sigmoid(x . coef + intercept), x the hashed n-grams of a text."""
    from safetensors.numpy import load_file
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(**_linear_settings(config))
    weights = load_file(Path(config.model) / "linear.safetensors")
    expected = {"coef": (vectorizer.n_features,), "intercept": (1,)}
    if (shapes := {name: array.shape for name, array in weights.items()}) != expected:
        raise ModelError(f"classifier {config.name!r}: {config.model} holds {shapes}, expected {expected}")
    coef, intercept = weights["coef"].astype(np.float64), float(weights["intercept"][0])

    def probability(texts: list[str]) -> np.ndarray:
        return np.exp(-np.logaddexp(0.0, -(vectorizer.transform(texts) @ coef + intercept)))

    return probability


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise RewardError(
            f"classifier {name!r} returned {int((~np.isfinite(values)).sum())} values that are not finite"
        )
    return values


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".;")
