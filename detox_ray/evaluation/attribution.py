"""How much of a response's likelihood goes back to which token of its prompt: integrated gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detox_ray.errors import ConfigError


@dataclass(frozen=True)
class Attribution:
    """What each token that the model read contributed to the log-probability of a response, in nats.

    `tokens: [P + R - 1] float64`, of the prompt and of the response but its last token; `change` is the log-probability
    of the response minus that of the same response after the baseline, which the contributions add up to as far as the
    integral is exact.
    """

    tokens: np.ndarray
    change: float

    @property
    def relative_error(self) -> float:
        """How far the contributions are from adding up to `change`, relative to it."""
        return abs(float(self.tokens.sum()) - self.change) / max(abs(self.change), 1e-12)


def mean_embedding(model: Any) -> Tensor:
    """The mean of the vocabulary's input embeddings, [H]: a token that is no token in particular.

    It is the baseline, and not zeros, because models that normalise their input turn fastest near zero: there the
    integral does not converge in a hundred steps.
    """
    return model.get_input_embeddings().weight.detach().float().mean(dim=0)


def integrated_gradients(
    model: Any,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    baseline: Tensor,
    steps: int,
    start_length: int = 0,
) -> Attribution:
    """Integrated gradients of log p(response | prompt) with respect to the embeddings it was computed from.

    Sundararajan et al. 2017, eq. 1, by captum's Gauss-Legendre quadrature. The path leads from `baseline: [H]` in every
    place to the tokens' own embeddings; the first `start_length` tokens (the start of the document, which all sequences
    share) stay what they are and so contribute nothing. `prompt_ids: [P]`, `response_ids: [R]`, both not empty; `model`
    is a transformers causal language model.
    """
    from captum.attr import IntegratedGradients

    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    targets = torch.tensor(response_ids, device=device)
    with torch.no_grad():
        tokens = embedding(torch.tensor([[*prompt_ids, *response_ids[:-1]]], device=device))
    start = baseline.to(tokens).expand_as(tokens).clone()
    start[:, :start_length] = tokens[:, :start_length]
    method = IntegratedGradients(lambda embeddings: response_logprob(model, embeddings, targets))
    found, excess = method.attribute(tokens, baselines=start, n_steps=steps, return_convergence_delta=True)
    contributions = found[0].double().sum(dim=-1).cpu().numpy()
    return Attribution(contributions, float(contributions.sum()) - float(excess))


def check_captum() -> None:
    """Look for captum, which a plain installation does not bring.

    Raises:
        ConfigError: it is not installed, or matplotlib, which it imports, is not.
    """
    try:
        import captum.attr  # noqa: F401 - only to see whether it can be
    except ImportError as error:
        raise ConfigError(f"the analysis needs captum ({error}): pip install 'detox_ray[analysis]'") from None


def response_logprob(model: Any, embeddings: Tensor, response_ids: Tensor) -> Tensor:
    """log p(response | what comes before it), [n], from `embeddings: [n, P + R - 1, H]` and `response_ids: [R]`."""
    length = len(response_ids)
    logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=length).logits.float()
    targets = response_ids.expand(len(embeddings), length)
    return -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(dim=1)


def normalized_entropy(contributions: np.ndarray) -> float:
    """Entropy of the shares of `|contributions|: [n]`, divided by log n: 0 is one token alone, 1 is all alike.

    NaN below two tokens, and where all contributions are 0.
    """
    sizes = np.abs(np.asarray(contributions, dtype=np.float64))
    if len(sizes) < 2 or sizes.sum() == 0:
        return float("nan")
    shares = sizes / sizes.sum()
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum() / np.log(len(sizes)))


def prompt_share(contributions: np.ndarray, prompt_length: int) -> float:
    """Share of `|contributions|: [P + R - 1]` on the first `prompt_length` tokens; NaN where all are 0."""
    sizes = np.abs(np.asarray(contributions, dtype=np.float64))
    return float(sizes[:prompt_length].sum() / sizes.sum()) if sizes.sum() > 0 else float("nan")
