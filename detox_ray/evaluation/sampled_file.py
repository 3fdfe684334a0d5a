"""Responses as they are sampled, on disk, so that a killed evaluation continues where it stopped."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detox_ray.records import Prompt, Rollout, Sampling

FOLDER = "sampled"


class SampledFile:
    """One line per prompt with all its responses; the file's name says what was sampled, and from what."""

    def __init__(
        self, folder: Path, system: str, model: str, prompts: Sequence[Prompt], samples: int, sampling: Sampling
    ) -> None:
        """`model` identifies the model and the adapter that answer."""
        content = json.dumps([model, samples, sampling.__dict__, [[p.id, *p.token_ids] for p in prompts]])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._path = folder / FOLDER / f"{system.replace(' ', '_')}-{digest}.jsonl"

    def read(self) -> dict[str, list[Rollout]]:
        """Prompt id -> responses; a last line that a kill cut short is left out, also of the file."""
        if not self._path.exists():
            return {}
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            self._path.write_text("".join(lines[:-1]), encoding="utf-8")
            lines = lines[:-1]
        found = (json.loads(line) for line in lines)
        return {line["prompt_id"]: [_rollout(line, r) for r in line["responses"]] for line in found}

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Add prompts with all their responses, those of a prompt next to each other."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        by_prompt: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
        with self._path.open("a", encoding="utf-8") as file:
            for samples in by_prompt.values():
                file.write(json.dumps(_line(samples)) + "\n")


def _line(samples: Sequence[Rollout]) -> dict[str, Any]:
    first = samples[0]
    responses = [
        {
            "ids": r.response_ids.tolist(),
            "text": r.text,
            "finish_reason": r.finish_reason,
            "adapter_version": r.adapter_version,
        }
        for r in samples
    ]
    return {
        "prompt_id": first.prompt_id,
        "prompt": first.prompt_text,
        "prompt_ids": first.prompt_ids.tolist(),
        "responses": responses,
    }


def _rollout(line: dict[str, Any], response: dict[str, Any]) -> Rollout:
    return Rollout(
        prompt_id=line["prompt_id"],
        prompt_text=line["prompt"],
        prompt_ids=np.array(line["prompt_ids"], dtype=np.int64),
        response_ids=np.array(response["ids"], dtype=np.int64),
        logprobs=np.full(len(response["ids"]), np.nan, dtype=np.float32),
        text=response["text"],
        finish_reason=response["finish_reason"],
        adapter_version=response["adapter_version"],
    )
