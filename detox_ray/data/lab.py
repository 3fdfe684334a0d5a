"""The bundled offline lab: prompts, a policy and two reward classifiers, made on first use and kept in a cache folder.

The folder is `lab-<version>-<seed>` in `~/.cache/detox_ray`, or in the folder that DETOX_RAY_CACHE names:

    prompts.jsonl   `{"prompt": text}` a line; none of them is in the text the policy was pre-trained on
    answers.jsonl   `{"prompt": text, "response": text}` a line, the responses civil; no prompt is in either of those
    policy/         a Llama of 1M parameters with its tokenizer; it answers rudely about half the time
    classifier/     a sequence classifier, labels 0 `civil` and 1 `rude`
    linear/         a hashed bag of words with a logistic regression (format: `lab_models.save_linear_classifier`)
    card.json       version, seed and the classifiers' held-out accuracy
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from detox_ray.config_section import LAB_PREFIX, S, Section, cache_folder
from detox_ray.errors import ConfigError, DataError
from detox_ray.folder_lock import locked

# To be raised with every change of what the lab contains, so that no stale one is used.
LAB_VERSION = 2

LabPart = Literal["prompts", "answers", "policy", "classifier", "linear"]
Progress = Callable[[str, float], None]

PROMPTS, TRAINING_EXCHANGES, HELDOUT_EXCHANGES, ANSWERED_EXCHANGES = 2400, 22_400, 1000, 4000


def lab_path(part: LabPart) -> Path:
    """The file or folder of one part of the lab of seed 0, which is built when absent (about a minute).

    Raises:
        ConfigError: there is no such part.
        DataError: the cache folder cannot be written.
    """
    _check_part(part, f"{LAB_PREFIX}{part}")
    return build_lab() / _file_of(part)


def lab_folder(seed: int = 0) -> Path:
    """Where the lab of a seed is, or will be once it is built."""
    return cache_folder() / f"lab-{LAB_VERSION}-{seed}"


def build_lab(seed: int = 0, progress: Progress | None = None) -> Path:
    """The lab's folder, built when absent; `progress` is told what is being made and the share done, in [0, 1].

    The folder appears complete or not at all; of several processes one builds and the others wait for it. The caller's
    random state and thread count are left as they were.

    Raises:
        DataError: the cache folder cannot be written.
    """
    folder = lab_folder(seed)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                # Whoever left one of these was killed: a living builder would hold the lock.
                for abandoned in folder.parent.glob(f"{folder.name}.building-*"):
                    shutil.rmtree(abandoned)
                building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.building-", dir=folder.parent))
                try:
                    _make(building, seed, progress or (lambda stage, share: None))
                    os.replace(building, folder)
                except OSError:
                    # Someone removed the lock and built meanwhile; theirs is as good.
                    if not folder.is_dir():
                        raise
                finally:
                    shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"the lab cannot be built in {folder.parent}: {error.strerror or error}; "
            "set DETOX_RAY_CACHE to a folder that can be written"
        ) from error
    return folder


def lab_source(source: str) -> Path:
    """The prompts file that `lab:prompts` names.

    Raises:
        ConfigError: `source` is another `lab:...`.
        DataError: as `build_lab`.
    """
    if source != f"{LAB_PREFIX}prompts":
        raise ConfigError(f"data.source = {source!r} is no set of prompts; give {LAB_PREFIX}prompts or a file")
    return lab_path("prompts")


def remove_lab() -> bool:
    """Removes the labs of every version and seed, also unfinished ones; whether there was a finished one."""
    if not cache_folder().is_dir():
        return False
    ours = [p for p in cache_folder().iterdir() if re.fullmatch(r"lab-\d+-\d+(\.lock|\.building-\w+)?", p.name)]
    for path in ours:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return any(p.suffix == "" for p in ours)


def uses_lab(config: Section) -> bool:
    """Whether any model or prompts of a configuration are the lab's."""
    return bool(_lab_values(config.model_dump()))


def resolve_lab(config: S, progress: Progress | None = None) -> S:
    """A copy of a configuration with the lab's paths in place of `lab:...`; the lab is built once when any is present.

    Raises:
        ConfigError: a `lab:...` value names no part of the lab.
        DataError: as `build_lab`.
    """
    tree = config.model_dump()
    values = _lab_values(tree)
    if not values:
        return config
    for key, value in values.items():
        _check_part(value.removeprefix(LAB_PREFIX), f"{key} = {value!r}")
    lab = build_lab(progress=progress)
    return type(config).model_validate(_replace_lab_values(tree, lab))


def _lab_values(tree: Any, key: str = "") -> dict[str, str]:
    """Dotted key -> `lab:...` value of a tree of dicts, lists and values."""
    if isinstance(tree, dict | list):
        children = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, child in children for k, v in _lab_values(child, f"{key}.{name}".lstrip(".")).items()}
    return {key: tree} if isinstance(tree, str) and tree.startswith(LAB_PREFIX) else {}


def _replace_lab_values(tree: Any, lab: Path) -> Any:
    if isinstance(tree, dict):
        return {name: _replace_lab_values(child, lab) for name, child in tree.items()}
    if isinstance(tree, list):
        return [_replace_lab_values(child, lab) for child in tree]
    if isinstance(tree, str) and tree.startswith(LAB_PREFIX):
        return str(lab / _file_of(tree.removeprefix(LAB_PREFIX)))
    return tree


def _make(folder: Path, seed: int, progress: Progress) -> None:
    """Writes every part of the lab into an empty folder."""
    progress("text", 0.0)
    # Importing torch and transformers takes seconds, and a lab that exists needs neither.
    import torch

    from detox_ray.data import lab_models
    from detox_ray.data.lab_text import exchanges

    prompts = [e.prompt for e in exchanges(seed, PROMPTS)]
    training = exchanges(seed + 1, TRAINING_EXCHANGES, exclude=frozenset(prompts))
    heldout = exchanges(seed + 2, HELDOUT_EXCHANGES, exclude=frozenset(prompts))
    seen = frozenset([*prompts, *(e.prompt for e in training)])
    answers = [e for e in exchanges(seed + 3, ANSWERED_EXCHANGES, exclude=seen) if not e.rude]
    _write_lines(folder / _file_of("prompts"), [{"prompt": prompt} for prompt in prompts])
    _write_lines(folder / _file_of("answers"), [{"prompt": e.prompt, "response": e.response} for e in answers])

    threads = torch.get_num_threads()
    # More threads do not help matrices this small; fewer are what OMP_NUM_THREADS or the caller asked for.
    torch.set_num_threads(min(threads, 4))
    try:
        with torch.random.fork_rng(devices=[]):
            progress("linear classifier", 0.02)
            linear_accuracy = lab_models.save_linear_classifier(training[:4000], heldout, folder / "linear")
            tokenizer = lab_models.train_tokenizer([e.prompt + e.response for e in training])
            classifier, classifier_tokenizer = lab_models.train_classifier(
                training, tokenizer, seed, lambda share: progress("classifier", 0.04 + 0.06 * share)
            )
            classifier_accuracy = lab_models.classifier_accuracy(classifier, classifier_tokenizer, heldout)
            policy = lab_models.train_policy(
                training, tokenizer, seed, lambda share: progress("policy", 0.1 + 0.89 * share)
            )
    finally:
        torch.set_num_threads(threads)
    with _no_progress_bars():
        classifier.save_pretrained(folder / "classifier")
        classifier_tokenizer.save_pretrained(folder / "classifier")
        policy.save_pretrained(folder / "policy")
        tokenizer.save_pretrained(folder / "policy")
    card = {
        "version": LAB_VERSION,
        "seed": seed,
        "classifier_accuracy": classifier_accuracy,
        "linear_accuracy": linear_accuracy,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    progress("done", 1.0)


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _file_of(part: str) -> str:
    return f"{part}.jsonl" if part in {"prompts", "answers"} else part


def _check_part(part: str, value: str) -> None:
    if part not in get_args(LabPart):
        known = ", ".join(LAB_PREFIX + name for name in get_args(LabPart))
        raise ConfigError(f"{value} is no part of the lab; there are {known}")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
