"""Several systems on one base, which answer a prompt together: the rows of one batch, each with its own adapter."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detox_ray.config import PolicyConfig
from detox_ray.policy.adapter_weights import put_adapters
from detox_ray.policy.load import load_base

# What PEFT calls a row without an adapter.
BASE = "__base__"


@dataclass(frozen=True)
class SystemToken:
    """A token of an answer, and how likely it was after the same prefix at temperature 1, in nats.

    `logprob` is that of the system that answers; `shift` is log p(adapter) - log p(base), of the system's own adapter
    or, in an answer of the base, of the last one. It is None where there is no adapter.
    """

    token_id: int
    logprob: float
    shift: float | None


class Systems:
    """The base (system 0) and its adapters (systems 1 and on), on one copy of the base's weights."""

    def __init__(self, config: PolicyConfig, adapters: Sequence[Path], device: torch.device) -> None:
        """Load the base as the learner does, and put every adapter on it.

        Raises:
            ModelError: the base cannot be loaded, or an adapter does not fit it.
        """
        self._device = device
        self._names = [BASE, *(f"adapter-{place}" for place in range(1, len(adapters) + 1))]
        # Of each system the one that its tokens are compared with.
        self._compared = [len(adapters), *(0 for _ in adapters)] if adapters else []
        model = put_adapters(load_base(config, device), dict(zip(self._names[1:], adapters, strict=True)))
        # OPT's feed-forward layers see [B * T, H], where PEFT finds the rows of a batch only as long as T is 1.
        self._one_by_one = model.config.model_type == "opt"
        model.eval()
        if config.quantization == "int8":
            _keep_learner_function(model)
        self._model = model

    @torch.inference_mode()
    def answer(
        self,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[list[SystemToken | None]]:
        """The next token of every system, step by step; None once the answer of a system has ended.

        At each step all systems get the same noise (Gumbel-max), so that two of them part only where their
        distributions do. Temperature 0 takes the likeliest token.
        """
        systems = len(self._names)
        rows = [*range(systems), *self._compared]
        adapters = [self._names[row] for row in rows]
        prompt = torch.tensor([list(prompt_ids)] * systems, device=self._device)
        cache: Any = None
        encoder: dict[str, Any] = {}
        config = self._model.config
        if config.is_encoder_decoder:
            encoder, prompt = {"input_ids": prompt}, torch.full_like(prompt[:, :1], config.decoder_start_token_id)
        for part in prompt.split(1 if self._one_by_one else prompt.shape[1], dim=1):
            output = self._forward(part, cache, self._names, encoder)
            cache = output.past_key_values
        # From here on a second row of each system reads the same tokens with the adapter they are compared with.
        cache.reorder_cache(torch.tensor(rows, device=self._device))
        if config.is_encoder_decoder:
            encoder = {"encoder_outputs": (output.encoder_last_hidden_state[rows],)}
        logits = output.logits[rows, -1].float()
        noise = torch.Generator().manual_seed(seed)
        running = [True] * systems
        for left in reversed(range(max_new_tokens)):
            gumbel = -torch.empty(logits.shape[1]).exponential_(generator=noise).log()
            tokens = choose_tokens(logits[:systems], gumbel.to(self._device), temperature, top_p)
            read = tokens.repeat(len(rows) // systems)
            logprobs = logits.log_softmax(dim=1).gather(1, read[:, None])[:, 0].tolist()
            yield [_token(system, tokens, logprobs) if running[system] else None for system in range(systems)]
            running = [on and int(token) not in end_ids for on, token in zip(running, tokens, strict=True)]
            if left == 0 or not any(running):
                return
            logits = self._forward(read[:, None], cache, adapters, encoder).logits[:, -1].float()

    def _forward(self, tokens: Tensor, cache: Any, adapters: list[str], encoder: dict[str, Any]) -> Any:
        """`tokens` go on with what is in the cache; `encoder` holds what an encoder reads, or what it made of it."""
        mixed = {"adapter_names": adapters} if len(self._names) > 1 else {}
        reads = {"decoder_input_ids": tokens, **encoder} if encoder else {"input_ids": tokens, "logits_to_keep": 1}
        return self._model(past_key_values=cache, use_cache=True, **reads, **mixed)


def choose_tokens(logits: Tensor, gumbel: Tensor, temperature: float, top_p: float) -> Tensor:
    """Logits [N, V] and the noise of a step [V] -> N tokens, sampled from softmax(logits / temperature)'s nucleus.

    The nucleus is the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020); the largest of
    logit + Gumbel noise is a sample of the softmax (Gumbel 1954).
    """
    if temperature == 0:
        return logits.argmax(dim=1)
    logits = logits / temperature
    if top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        probabilities = ordered.softmax(dim=1)
        outside = probabilities.cumsum(dim=1) - probabilities >= top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return (logits + gumbel).argmax(dim=1)


def _token(system: int, tokens: Tensor, logprobs: list[float]) -> SystemToken:
    """`logprobs` are those of the systems, then, where there are adapters, those they are compared with."""
    own, compared = logprobs[system], logprobs[len(tokens) + system] if len(logprobs) > len(tokens) else None
    if compared is None:
        return SystemToken(int(tokens[system]), own, None)
    return SystemToken(int(tokens[system]), own, compared - own if system == 0 else own - compared)


def _keep_learner_function(model: torch.nn.Module) -> None:
    """Leave int8 layers in training mode: in evaluation mode they compute another function on a CPU."""
    from bitsandbytes.nn import Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.train()
