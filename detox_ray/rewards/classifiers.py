"""Toxicity classifiers: texts in, scores out, signed so that less toxic is always higher."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import ModelError
from detox_ray.hub import why_not_loaded
from detox_ray.records import Readings
from detox_ray.rewards.deadline import check_deadline
from detox_ray.rewards.evaluate_measurement import EvaluateClassifier, check_measurement
from detox_ray.rewards.linear import LinearClassifier, check_linear
from detox_ray.rewards.model_config import check_sequence_classifier, label_index, load_model_config
from detox_ray.rewards.perspective import PerspectiveClassifier, check_perspective
from detox_ray.rewards.probability import finite

# Windows of a long text share a quarter of their tokens, so that what one cuts in two another holds whole.
WINDOW_OVERLAP = 4

Output = Literal["logit", "logprob", "probability"]


class Classifier(Protocol):
    """What scores texts; no method depends on the order or the grouping of the texts.

    Those that read in batches raise DeadlineError between two of them once the time of `answer_within` is over.
    """

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
        ConfigError: the label does not exist, the import path cannot be imported, the API's key is missing or its
            cache cannot be used, or the code of a measurement is not trusted.
        ModelError: the model is missing, has no safetensors weights, no trained head or no pad token; the measurement
            cannot be loaded.
    """
    match config.kind:
        case "transformers":
            return TransformersClassifier(config, device)
        case "linear":
            return LinearClassifier(config)
        case "perspective":
            return PerspectiveClassifier(config)
        case "evaluate":
            return EvaluateClassifier(config)


def score_texts(configs: Sequence[ClassifierConfig], texts: Sequence[str]) -> list[dict[str, float]]:
    """For each text, of any length, the probability of toxicity by each classifier, by name, in this process.

    Raises:
        ConfigError, ModelError, RewardError: as `load_classifier` and `Classifier.toxicity`.
    """
    columns = {config.name: load_classifier(config).read(list(texts)).toxicity.tolist() for config in configs}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def check_classifier(config: ClassifierConfig) -> None:
    """Raises what `load_classifier` would raise, as far as that can be known without loading weights.

    Raises:
        ConfigError, ModelError: as `load_classifier`.
    """
    match config.kind:
        case "transformers":
            check_sequence_classifier(config)
        case "linear":
            check_linear(config)
        case "perspective":
            check_perspective(config)
        case "evaluate":
            check_measurement(config)


class TransformersClassifier:
    """A sequence classifier of transformers, read at one label."""

    def __init__(self, config: ClassifierConfig, device: str | None = None) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.name = config.name
        self._config = config
        model_config = load_model_config(config)
        self._label = label_index(config, model_config.id2label)
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
                f"classifier {config.name!r}: cannot load {config.model!r}: {why_not_loaded(config.model, error)}; "
                "it needs a tokenizer and safetensors weights"
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
                check_deadline(self.name)
                rows = order[start : start + self._config.batch_size]
                batch = self._tokenizer.pad(
                    {key: [values[i] for i in rows] for key, values in encoded.items()}, return_tensors="pt"
                ).to(self._device)
                logits[rows] = self._model(**batch).logits.double().cpu().numpy()
        return finite(self.name, logits) / self._config.temperature

    @property
    def _empty_token_id(self) -> int:
        tokenizer = self._tokenizer
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return next(token for token in candidates if token is not None)


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
