"""`kind: evaluate`: the toxicity measurement of the `evaluate` package, with any sequence classifier as its model."""

from pathlib import Path
from typing import Any

from detox_ray.classifier_config import ClassifierConfig, measurement_script
from detox_ray.errors import ConfigError, ModelError, RewardError, first_line
from detox_ray.rewards.model_config import HUB_ID, check_sequence_classifier
from detox_ray.rewards.probability import ProbabilityClassifier


class EvaluateClassifier(ProbabilityClassifier):
    """`evaluate.load(module, model, module_type="measurement")`, computed with `label` as its `toxic_label`.

    The measurement cuts long texts where the model's tokenizer does and chooses its own device and batches.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        import evaluate

        self._label = check_measurement(config)
        path = Path(config.model).expanduser()
        try:
            self._measurement = evaluate.load(
                str(measurement_script(config.module) or config.module),
                str(path.absolute()) if path.exists() else config.model,
                module_type="measurement",
                # On disk, texts would be written to a folder named after the model: for a local one, into the model.
                keep_in_memory=True,
            )
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise ModelError(
                f"classifier {config.name!r}: cannot load measurement {config.module!r} with {config.model!r}: "
                f"{first_line(error)}; give a measurement in the format of evaluate's toxicity, and a classifier"
            ) from error
        super().__init__(config, self._measure)

    def _measure(self, texts: list[str]) -> Any:
        """The module's score of each text."""
        try:
            return self._measurement.compute(predictions=texts, toxic_label=self._label)["toxicity"]
        except Exception as error:
            # The code of others can fail in any way, and the messages of evaluate quote the texts.
            raise RewardError(
                f"classifier {self.name!r}: measurement {self._config.module!r} failed on {len(texts)} texts with "
                f"{type(error).__name__}; are they longer than {self._config.model!r} reads?"
            ) from None


def check_measurement(config: ClassifierConfig) -> str:
    """The name of the label that is read, once the model exists and the measurement's code may be run.

    Raises:
        ConfigError: the model has no such label, a revision is set, or the measurement is the hub's and not trusted.
        ModelError: model or measurement do not exist.
    """
    where = f"classifier {config.name!r}: measurement {config.module!r}"
    if config.revision is not None:
        raise ConfigError(f"{where} always loads the newest {config.model!r}: download revision {config.revision!r}")
    if measurement_script(config.module) is None:
        if not HUB_ID.fullmatch(config.module):
            raise ModelError(f"{where} does not exist; give a script, a folder with a script of its name, or a hub id")
        if not config.trust_module:
            raise ConfigError(
                f"{where} is code from the hub that would run here; read it, then set trust_module: true, "
                "or give the path of a local copy"
            )
    return check_sequence_classifier(config)
