"""Token-level log-probabilities from hidden states, with the vocabulary-wide tensors kept small. Pure tensors."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25  # 128 MiB in float32: the most that one chunk of logits may hold


def chunk_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float,
    suppressed: Tensor | None,
    entropy: Literal["none", "value", "gradient"],
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of so few positions that all their logits may be alive at once."""
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


def token_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
    entropy: Literal["none", "value", "gradient"] = "none",
    max_logits: int = MAX_LOGITS,
    one_chunk: Callable[..., tuple[Tensor, Tensor]] = chunk_logprobs,
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
        one_chunk: `chunk_logprobs`, or that compiled.

    Returns:
        logprobs [N] float32, entropy [N] float32 (zeros where it was not asked for).
    """
    if hidden.shape[0] == 0:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty

    size = max(1, max_logits // vocabulary_size(head, hidden))
    options = (temperature, suppressed, entropy)
    if hidden.shape[0] <= size:
        return one_chunk(hidden, head, targets, *options)
    parts = []
    for start in range(0, hidden.shape[0], size):
        chunk = (hidden[start : start + size], head, targets[start : start + size], *options)
        if torch.is_grad_enabled() and hidden.requires_grad:
            parts.append(checkpoint(one_chunk, *chunk, use_reentrant=False))
        else:
            parts.append(one_chunk(*chunk))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def vocabulary_size(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """Number of logits `head` makes for one position."""
    size = getattr(head, "out_features", None)
    if size is not None:
        return int(size)
    with torch.no_grad():
        return head(hidden[:1]).shape[1]
