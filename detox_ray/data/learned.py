"""Which prompts an adapter was trained on, so that a run which starts from it holds none of them out."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from detox_ray.metrics_file import LEARNED_FILE, write_atomically


def learned_by(*adapters: str | None) -> frozenset[str]:
    """Digests of the groups of prompts that the adapters of run folders were trained on, there or before.

    Nothing is known of an adapter that lies in no run folder.
    """
    files = [Path(adapter).parent / LEARNED_FILE for adapter in adapters if adapter is not None]
    return frozenset(line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").split())


def write_learned(folder: Path, groups: Iterable[str], adapter: str | None) -> None:
    """Leave in a run folder what its adapter learns from, and what the adapter it starts from has learned from."""
    digests = {learned_digest(group) for group in groups} | learned_by(adapter)
    write_atomically(folder / LEARNED_FILE, "".join(f"{digest}\n" for digest in sorted(digests)))


def learned_digest(group: str) -> str:
    """How a group of prompts, which is the turn that their dialogues begin with, stands in the file."""
    return hashlib.sha256(group.encode()).hexdigest()[:16]
