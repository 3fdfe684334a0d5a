"""Token-level log-probabilities from hidden states, with the vocabulary-wide tensors kept small. Pure tensors."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25  # 128 MiB in float32: the most that one chunk of logits may hold


def token_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
    entropy: Literal["none", "value", "gradient"] = "none",
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, in nats.

    The logits `head(hidden)` are made in chunks of at most `max_logits` numbers and, where gradients are wanted, made
    again in the backward pass, so that never more than one chunk is alive.

    Args:
        hidden: [N, H] last hidden states at the positions that predict the targets.
        head: hidden [n, H] -> logits [n, V].
        targets: [N] int64.
        temperature: logits are divided by it.
        suppressed: [S] int64, tokens that cannot be sampled (their logit is minus infinity).
        entropy: whether to compute it, and whether gradients flow through it.
        max_logits: numbers in a chunk.

    Returns:
        logprobs [N] float32, entropy [N] float32 (zeros where it was not asked for).
    """
    if hidden.shape[0] == 0:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty

    def chunk_logprobs(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float()
        if temperature != 1.0:
            logits = logits / temperature
        if suppressed is not None:
            logits = logits.index_fill(1, suppressed, torch.finfo(logits.dtype).min)
        if entropy == "none":
            logprobs = -F.cross_entropy(logits, targets, reduction="none")
            return logprobs, torch.zeros_like(logprobs)
        distribution = logits.log_softmax(dim=1)
        with nullcontext() if entropy == "gradient" else torch.no_grad():
            entropies = -(distribution.exp() * distribution).sum(dim=1)
        return distribution.gather(1, targets[:, None])[:, 0], entropies

    size = max(1, max_logits // vocabulary_size(head, hidden))
    if hidden.shape[0] <= size:
        return chunk_logprobs(hidden, targets)
    parts = []
    for start in range(0, hidden.shape[0], size):
        chunk = (hidden[start : start + size], targets[start : start + size])
        if torch.is_grad_enabled() and hidden.requires_grad:
            parts.append(checkpoint(chunk_logprobs, *chunk, use_reentrant=False))
        else:
            parts.append(chunk_logprobs(*chunk))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def vocabulary_size(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """Number of logits `head` makes for one position."""
    size = getattr(head, "out_features", None)
    if size is not None:
        return int(size)
    with torch.no_grad():
        return head(hidden[:1]).shape[1]
