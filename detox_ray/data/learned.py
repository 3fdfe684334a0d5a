"""Which prompts an adapter was trained on, so that a run which starts from it holds none of them out."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from detox_ray.metrics_file import LEARNED_FILE, write_atomically


def is_known(adapter: str) -> bool:
    """Whether the adapter lies in a run folder that says what it was trained on."""
    return _file_of(adapter).is_file()


def learned_by(*adapters: str | None) -> frozenset[str]:
    """Digests of the texts the adapters were trained on, earlier trainings included; an unknown adapter adds none."""
    files = [_file_of(adapter) for adapter in adapters if adapter is not None and is_known(adapter)]
    return frozenset(line for file in files for line in file.read_text(encoding="utf-8").split())


def write_learned(folder: Path, texts: Iterable[str], before: Iterable[str]) -> None:
    """Leave in a run folder which texts its adapter learns from, beside the digests of what it learned `before`."""
    digests = {*map(learned_digest, texts), *before}
    write_atomically(folder / LEARNED_FILE, "".join(f"{digest}\n" for digest in sorted(digests)))


def learned_digest(text: str) -> str:
    """How a text, which is a prompt or the turn that a dialogue begins with, stands in the file."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file_of(adapter: str) -> Path:
    return Path(adapter).parent / LEARNED_FILE
