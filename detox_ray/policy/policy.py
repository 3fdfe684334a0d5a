"""Policy, reference and value function in one module, on one frozen base."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from detox_ray.config import PolicyConfig
from detox_ray.errors import ModelError, one_line
from detox_ray.policy.adapter import Adapter, load_adapter
from detox_ray.policy.adapter_weights import check_fits, read_weights, tensors_of, write_weights
from detox_ray.policy.architecture import (
    adapter_task,
    language_model_class,
    language_model_head,
    next_token_logits,
    response_states,
)
from detox_ray.policy.compilation import check_compiler, compile_blocks
from detox_ray.policy.load import check_quantization, is_conv1d, load_base, load_model_config
from detox_ray.policy.sequences import Sequences
from detox_ray.policy.sharding import shard_blocks
from detox_ray.policy.tokens import chunk_logprobs, token_logprobs
from detox_ray.records import Canary

CANARY_LENGTH = 150  # more than vLLM's largest block, so that a stale cached block shows
TRAINED, REFERENCE = "default", "reference"  # the names PEFT knows the adapters by


@dataclass(frozen=True)
class PolicyOutput:
    """What the policy gives for each response token: [B, R] float32 each, zero where there is no token."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor


class Policy(nn.Module):
    """Policy = base + adapter; reference = the same base, adapter off; value = a linear head on the policy's trunk.

    With `policy.reference: adapter` the reference is the base with the adapter that training starts from, frozen.
    Trainable parameters are the adapter's and the value head's, in float32.
    """

    def __init__(
        self,
        config: PolicyConfig,
        device: torch.device,
        seed: int = 0,
        shard_base: bool = False,
        compiled: bool = False,
    ) -> None:
        """Load the base and attach a fresh adapter (or `policy.adapter`) and a value head of zeros.

        With `shard_base` it is spread over the learners, see `shard_blocks`; with `compiled` the first passes take
        minutes and the later ones less time, see `compile_blocks`.

        Raises:
            ModelError: the model cannot be loaded, or the adapter or its targets do not fit it.
            ConfigError: it is to be compiled, and there is no compiler.
        """
        super().__init__()
        base = load_base(config, device, torch.device("cpu") if shard_base else device)
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        torch.manual_seed(seed)
        self.model = attach_adapter(base, config)
        hidden_size = base.get_output_embeddings().weight.shape[-1]
        self.value_head = nn.Linear(hidden_size, 1, device=device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._reference_adapter = config.reference == "adapter"
        if config.adapter is not None:
            start = load_adapter(config.adapter)
            self.load(start)
            if self._reference_adapter:
                add_frozen_adapter(self.model, start, REFERENCE)
        self._chunk_logprobs = chunk_logprobs
        if compiled:
            check_compiler()
            compile_blocks(self.model)
            self._chunk_logprobs = torch.compile(chunk_logprobs, dynamic=True)
        if shard_base:
            shard_blocks(self.model, device)
        self.train()

    def forward(
        self,
        sequences: Sequences,
        temperature: float = 1.0,
        suppressed: Tensor | None = None,
        entropy: Literal["none", "value", "gradient"] = "none",
        reference: bool = False,
    ) -> PolicyOutput:
        """Log-probability, value and entropy at every response token.

        Args:
            sequences: B sequences with responses of at most R tokens.
            temperature: of the distribution, as in sampling.
            suppressed: [S] int64, tokens that were not allowed in sampling.
            entropy: see `token_logprobs`.
            reference: use the reference policy; `values` are then meaningless.
        """
        with self._as_reference() if reference else nullcontext():
            base = self.model.get_base_model()
            mask = sequences.response_mask()
            predictors = response_states(base, sequences)[mask]
            head = language_model_head(base)
            flat_logprobs, flat_entropy = token_logprobs(
                predictors,
                head,
                sequences.response_ids()[mask],
                temperature,
                suppressed,
                entropy,
                one_chunk=self._chunk_logprobs,
            )
            flat_values = self.value_head(predictors.float())[:, 0]
        return PolicyOutput(*(_unflatten(flat, mask) for flat in (flat_logprobs, flat_values, flat_entropy)))

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Switch the adapter off, or the reference's on in its place."""
        if not self._reference_adapter:
            with self.model.disable_adapter():
                yield
            return
        self.model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield
        finally:
            self.model.set_adapter(TRAINED)

    def canary(self, max_length: int) -> Canary:
        """The policy's own answers on the canary, without dropout; never compiled, as it runs too seldom."""
        self.set_dropout(False)
        with torch.compiler.set_stance("force_eager"):
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

    def adapter(self, version: int = 0) -> Adapter:
        """A copy of the adapter, to save or, as a version, to send."""
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
    _require_targets(base, config.lora.targets)
    lora = PeftLoraConfig(
        task_type=adapter_task(base.config),
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # annotated int, but any number works
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.targets,
        fan_in_fan_out=any(is_conv1d(module) for module in base.modules()),
        base_model_name_or_path=config.model,
    )
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        reason = one_line(error)
        raise ModelError(f"policy.lora.targets={config.lora.targets}: {reason}") from None
    _compute_as_base(model)
    return model


class _AdapterLinear(nn.Linear):
    """Computes in the precision of its input; the weight itself stays in float32, for the optimiser."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def _compute_as_base(model: PeftModel) -> None:
    """Have adapters compute in the base's precision, where PEFT copies every input to float32 for them."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.__class__ = _AdapterLinear


def _require_targets(base: PreTrainedModel, targets: str | list[str]) -> None:
    """Raises:
    ModelError: a target is no module of the model; the message lists the linear ones.
    """
    names = [name for name, _ in base.named_modules()]
    for target in [] if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = {
                name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)
            }
            raise ModelError(
                f"policy.lora.targets={targets}: the model has no module {target!r}; it has "
                f"{', '.join(sorted(linear))}: name some of them, or all-linear"
            )


def add_frozen_adapter(model: PeftModel, adapter: Adapter, name: str) -> None:
    """Attach a second adapter of the active one's shape, under a name, which no training changes."""
    model.add_adapter(name, copy.deepcopy(model.peft_config[TRAINED]))
    set_peft_model_state_dict(model, tensors_of(adapter), adapter_name=name)
    _compute_as_base(model)
    model.set_adapter(TRAINED)


def check_adapter(config: PolicyConfig) -> None:
    """Check `policy.lora` and `policy.adapter` against the model's shapes, without loading any weight of the model.

    Raises:
        ModelError: the targets are not in the model, the adapter cannot be read or was made for another base, or this
            machine cannot quantise.
    """
    check_quantization(config)
    with torch.device("meta"):
        model_config = load_model_config(config)
        base = language_model_class(model_config).from_config(model_config)
        skeleton = attach_adapter(base, config)
    if config.adapter is not None:
        check_fits(skeleton, load_adapter(config.adapter))


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """[N] -> [B, R] with the N values where `mask` is true and zeros elsewhere; differentiable."""
    return flat.new_zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, flat.float())


@torch.no_grad()
def canary_of(model: Any, max_length: int) -> Canary:
    """The answers of any `transformers` or PEFT language model on fixed sequences that a push is checked on.

    Seeded random tokens, one by one: a short sequence and one that spans a cache block, at most `max_length` long.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, max_length) for length in (16, CANARY_LENGTH)]
    prefixes = [torch.randint(0, model.config.vocab_size, (n,), generator=generator) for n in lengths]
    listed = [prefix.tolist() for prefix in prefixes]
    answers = [next_token_logits(model, prefix).log_softmax(dim=0).cpu() for prefix in listed]
    return Canary(listed, torch.stack(answers).numpy())
