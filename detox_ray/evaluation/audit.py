"""A bias audit, told in the order it happens: read the cases, let every scorer judge them, say where each errs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.data.cases import CaseColumns, CaseLabels, Cases, read_cases
from detox_ray.errors import ConfigError
from detox_ray.evaluation.audit_report import Audit, write_audit
from detox_ray.evaluation.comparison import installed_versions
from detox_ray.evaluation.group_toxicity import PolicyAudit, audit_generations
from detox_ray.evaluation.responses import read_generations
from detox_ray.evaluation.scorer_audit import audit_scorer, mention_functionalities
from detox_ray.rewards.classifiers import Classifier, check_classifier, load_classifier

# Texts a scorer judges between two moves of the progress bar.
CHUNK_TEXTS = 512

# (scorer, texts judged, texts in all)
Progress = Callable[[str, int, int], None]


def run_audit(
    path: str | Path,
    scorers: Sequence[ClassifierConfig],
    folder: Path,
    columns: CaseColumns | None = None,
    labels: CaseLabels | None = None,
    generations: Path | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Audit scorers on a file of labelled cases, and write `audit.json`, `audit.md` and `audit.html` into `folder`.

    Args:
        path: CSV, TSV, JSONL or Parquet; by default in HateCheck's format.
        scorers: each with a name of its own; their calibration is not used.
        folder: made when it is not there.
        columns, labels: how to read the file, if it is not HateCheck's.
        generations: a generations.parquet whose column `group` says whom a prompt mentions; its systems are audited
            as well.
        progress: called with the scorer's name, the texts it has judged, and all texts.

    Raises:
        ConfigError, DataError, ModelError: something does not fit; nothing has been scored.
        RewardError: a scorer failed.
    """
    names = [scorer.name for scorer in scorers]
    if not names:
        raise ConfigError("the audit has no scorers; name at least one")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two scorers are called {repeated[0]!r}; give each its own name")
    columns = columns or CaseColumns()
    cases = read_cases(path, columns, labels)
    policy = None if generations is None else audit_generations(read_generations(generations))
    for scorer in scorers:
        check_classifier(scorer)
    models = {scorer.name: scorer.model for scorer in scorers}
    # One after the other, so that only one classifier is in memory.
    loaded = (load_classifier(scorer) for scorer in scorers)
    audit = audit_cases(cases, loaded, Path(path).name, columns, models, policy, progress)
    write_audit(folder, audit)
    return audit


def audit_cases(
    cases: Cases,
    classifiers: Iterable[Classifier],
    source: str,
    columns: CaseColumns,
    models: Mapping[str, str] | None = None,
    policy: PolicyAudit | None = None,
    progress: Progress | None = None,
) -> Audit:
    """What the classifiers make of the cases; `source` and `models` (scorer -> model) only name what was audited.

    Raises:
        RewardError: a classifier failed.
    """
    mere = mention_functionalities(cases)
    scorers = []
    for classifier in classifiers:
        toxicity = _toxicity(classifier, cases.texts, progress)
        scorers.append(audit_scorer(classifier.name, toxicity, cases, mere))
    return Audit(
        source=source,
        columns=columns,
        rows=cases.rows,
        cases=len(cases.texts),
        toxic=int(cases.toxic.sum()),
        left_out=cases.left_out,
        noted=cases.noted,
        mention_functionalities=mere,
        models=dict(models or {}),
        scorers=scorers,
        policy=policy,
        versions=installed_versions(),
    )


def _toxicity(classifier: Classifier, texts: Sequence[str], progress: Progress | None) -> np.ndarray:
    parts = []
    for start in range(0, len(texts), CHUNK_TEXTS):
        parts.append(classifier.toxicity(texts[start : start + CHUNK_TEXTS]))
        if progress is not None:
            progress(classifier.name, min(start + CHUNK_TEXTS, len(texts)), len(texts))
    return np.concatenate(parts)
