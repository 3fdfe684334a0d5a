"""How well a reference language model predicts responses, given their prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from detox_ray.errors import DataError, ModelError
from detox_ray.hub import why_not_loaded
from detox_ray.policy.architecture import language_model_class, response_logits
from detox_ray.policy.sequences import collate


def load_reference_model(
    path: str, revision: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A language model for scoring, in evaluation mode.

    `path` is a folder or hub id with safetensors weights; code that comes with a model is not run.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        model = language_model_class(config).from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"reference model {path!r} does not load as a language model: {why_not_loaded(path, error)}"
        ) from error
    return torch.nn.Module.to(model, device).eval().requires_grad_(False)


@torch.no_grad()
def response_nll(
    model: Any,
    prompt_ids: Sequence[Sequence[int] | np.ndarray],
    response_ids: Sequence[Sequence[int] | np.ndarray],
    batch_size: int,
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each response given its prompt, teacher-forced.

    `prompt_ids`, `response_ids`: N token sequences each; leave the end token out of a response. `model` is a
    transformers language model, used in the mode (train or eval) it is in. Returns `(nll_sum [N] float64 in
    nats, tokens [N] int64)`; an empty response has 0 of both.

    Raises:
        DataError: a prompt without tokens, or different numbers of prompts and responses.
    """
    if len(prompt_ids) != len(response_ids):
        raise DataError(f"{len(prompt_ids)} prompts for {len(response_ids)} responses: give one prompt per response")
    if any(len(ids) == 0 for ids in prompt_ids):
        raise DataError("a prompt has no tokens, so its response has nothing to follow: drop it, or add a start token")
    tokens = np.array([len(ids) for ids in response_ids], dtype=np.int64)
    nll = np.zeros(len(tokens))
    lengths = tokens + np.array([len(ids) for ids in prompt_ids], dtype=np.int64)
    # Longest first: padding stays small and a batch that does not fit in memory fails at once.
    order = [i for i in np.argsort(-lengths, kind="stable") if tokens[i] > 0]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        nll[batch] = _batch_nll(model, [prompt_ids[i] for i in batch], [response_ids[i] for i in batch], pad_id)
    return nll, tokens


def _batch_nll(model: Any, prompts: list[Any], responses: list[Any], pad_id: int) -> np.ndarray:
    """Nats of each response, [B] float64."""
    prompts, responses = ([np.asarray(ids, dtype=np.int64) for ids in texts] for texts in (prompts, responses))
    sequences = collate(prompts, responses, pad_id, model.device)
    mask = sequences.response_mask()
    # Only the rows that predict a response token are ever widened to float32.
    logits = response_logits(model, sequences)[mask].float()
    per_token = torch.zeros(mask.shape, dtype=torch.float64, device=logits.device)
    per_token[mask] = torch.nn.functional.cross_entropy(
        logits, sequences.response_ids()[mask], reduction="none"
    ).double()
    return per_token.sum(dim=1).cpu().numpy()
