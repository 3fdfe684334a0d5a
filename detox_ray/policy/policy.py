"""Policy, reference and value function in one module, on one frozen base."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from detox_ray.config import PolicyConfig
from detox_ray.errors import ModelError
from detox_ray.policy.adapter import Adapter, check_fits, load_adapter, read_weights, write_weights
from detox_ray.policy.load import load_base, load_model_config
from detox_ray.policy.sequences import Sequences
from detox_ray.policy.tokens import token_logprobs

CANARY_LENGTH = 150  # more than vLLM's largest block, so that a stale cached block shows


@dataclass(frozen=True)
class Canary:
    """Fixed prefixes and the policy's next-token log-probabilities for them: [K, V] float32."""

    prefixes: list[list[int]]
    logprobs: np.ndarray


@dataclass(frozen=True)
class TokenValues:
    """What the module says of the response tokens, all [B, R] float32, zero where there is no token."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor


class Policy(nn.Module):
    """Policy = base + adapter; reference = the same base, adapter off; value = a linear head on the policy's trunk.

    Trainable parameters are the adapter's and the value head's, in float32.
    """

    def __init__(self, config: PolicyConfig, device: torch.device, seed: int = 0) -> None:
        """Load the base and attach a fresh adapter (or `policy.adapter`) and a value head of zeros.

        Raises:
            ModelError: the model cannot be loaded, or the adapter or its targets do not fit it.
        """
        super().__init__()
        base = load_base(config, device)
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        torch.manual_seed(seed)
        self.model = attach_adapter(base, config)
        hidden_size = base.get_output_embeddings().weight.shape[-1]
        self.value_head = nn.Linear(hidden_size, 1, device=device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if config.adapter is not None:
            self.load(load_adapter(config.adapter))
        self.train()

    @property
    def trunk(self) -> nn.Module:
        """The transformer below the language-model head."""
        causal: Any = self.model.get_base_model()
        return getattr(causal, causal.base_model_prefix)

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """Hidden states [N, H] -> logits [N, V]."""
        causal: Any = self.model.get_base_model()
        return causal.get_output_embeddings()

    def forward(
        self,
        sequences: Sequences,
        temperature: float = 1.0,
        suppressed: Tensor | None = None,
        entropy: Literal["none", "value", "gradient"] = "none",
        reference: bool = False,
    ) -> TokenValues:
        """Log-probability, value and entropy at every response token.

        Args:
            sequences: B sequences with responses of at most R tokens.
            temperature: of the distribution, as in sampling.
            suppressed: [S] int64, tokens that were not allowed in sampling.
            entropy: see `token_logprobs`.
            reference: switch the adapter off (the values are then the reference trunk's, of no use).
        """
        with self.model.disable_adapter() if reference else nullcontext():
            hidden = self.trunk(input_ids=sequences.input_ids, use_cache=False).last_hidden_state
            mask = sequences.response_mask()
            rows = torch.arange(mask.shape[0], device=mask.device)[:, None]
            predictors = hidden[rows, sequences.predictor_positions()][mask]
            flat_logprobs, flat_entropy = token_logprobs(
                predictors, self.head, sequences.response_ids()[mask], temperature, suppressed, entropy
            )
            flat_values = self.value_head(predictors.float())[:, 0]
        return TokenValues(*(_unflatten(flat, mask) for flat in (flat_logprobs, flat_values, flat_entropy)))

    def canary(self, max_length: int) -> Canary:
        """The policy's own answers on the canary, without dropout."""
        self.set_dropout(False)
        return canary_of(self.model, max_length)

    def set_dropout(self, active: bool) -> None:
        """Switch the adapter's dropout; the base has none.

        Everything else stays in training mode: in evaluation mode int8 layers compute another function.
        """
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.train(active)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's and the value head's parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The adapter's part of `trainable`."""
        return [p for name, p in self.trainable().items() if not name.startswith("value_head")]

    def adapter(self, version: int) -> Adapter:
        """A copy of the adapter, to save or to send."""
        return read_weights(self.model, version)

    def load(self, adapter: Adapter) -> None:
        """Replace the adapter's weights.

        Raises:
            ModelError: it was made for another base.
        """
        write_weights(self.model, adapter)


def attach_adapter(base: PreTrainedModel, config: PolicyConfig) -> PeftModel:
    """The base with a fresh LoRA adapter that changes nothing yet.

    Raises:
        ModelError: `policy.lora.targets` names no module of it.
    """
    lora = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # annotated int, but any number works
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.targets,
        base_model_name_or_path=config.model,
    )
    try:
        return get_peft_model(base, lora)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"policy.lora.targets={config.lora.targets}: {reason}") from None


def check_adapter(config: PolicyConfig) -> None:
    """Check `policy.lora` and `policy.adapter` against the model's shapes, without loading any weight of the model.

    Raises:
        ModelError: the targets are not in the model, or the adapter cannot be read or was made for another base.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(load_model_config(config))
        skeleton = attach_adapter(base, config)
    if config.adapter is not None:
        check_fits(skeleton, load_adapter(config.adapter))


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """[N] -> [B, R] with the N values where `mask` is true and zeros elsewhere; differentiable."""
    return flat.new_zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, flat.float())


@torch.no_grad()
def canary_of(model: Any, max_length: int) -> Canary:
    """The answers of any `transformers` or PEFT causal model on fixed sequences that a push is checked on.

    Seeded random tokens, one by one: a short sequence and one that spans a cache block, at most `max_length` long.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, max_length) for length in (16, CANARY_LENGTH)]
    prefixes = [torch.randint(0, model.config.vocab_size, (n,), generator=generator) for n in lengths]
    logits = [model(input_ids=p[None].to(model.device)).logits[0, -1].float() for p in prefixes]
    return Canary([p.tolist() for p in prefixes], torch.stack([x.log_softmax(dim=0).cpu() for x in logits]).numpy())
