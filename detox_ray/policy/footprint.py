"""What a model needs in memory, from its configuration alone: nothing is loaded, shapes are followed on no device.

Sizes are bytes. Activations are not a formula: the forward pass runs on shapes, and what autograd keeps is added up.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from detox_ray.config import PolicyConfig
from detox_ray.policy.architecture import language_model_class
from detox_ray.policy.load import load_model_config
from detox_ray.policy.policy import attach_adapter
from detox_ray.policy.sharding import transformer_blocks
from detox_ray.policy.tokens import MAX_LOGITS

# NF4 scales: a float32 for 64 weights, or with double quantisation a byte for 64 and a float32 for 64 * 256 of those
# (Dettmers et al. 2023, section 3).
NF4_BLOCK, NF4_SECOND_BLOCK = 64, 256


@dataclass(frozen=True)
class Skeleton:
    """A model without numbers: the base in `dtype` with its adapter, on torch's meta device."""

    model: PeftModel
    dtype: torch.dtype

    @property
    def base(self) -> Any:
        """The language model below the adapter."""
        return self.model.get_base_model()

    def quantizable(self) -> list[Tensor]:
        """The weights of the linear layers that bitsandbytes replaces.

        It leaves the language-model head, and those that want more precision than it has (T5's `wo`).
        """
        head, precise = self.base.get_output_embeddings(), self.base._keep_in_fp32_modules
        return [
            module.weight
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and module is not head
            and not module.weight.requires_grad
            and precise.isdisjoint(name.split("."))
        ]

    def base_parameters(self) -> int:
        """Numbers in the base; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters() if not p.requires_grad)

    def adapter_parameters(self) -> int:
        """Trained numbers."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def load_skeleton(policy: PolicyConfig, dtype: torch.dtype) -> Skeleton:
    """The policy's shape.

    Raises:
        ModelError: the model's configuration cannot be read, or `lora.targets` names no module of it.
    """
    with torch.device("meta"):
        model_config = load_model_config(policy)
        base = language_model_class(model_config).from_config(model_config, dtype=dtype)
        return Skeleton(attach_adapter(base, policy), dtype)


def weight_bytes(shape: Skeleton, quantization: str, double_quantization: bool = True) -> float:
    """The frozen base as the learner holds it."""
    linear = sum(weight.numel() for weight in shape.quantizable())
    rest = (shape.base_parameters() - linear) * shape.dtype.itemsize
    match quantization:
        case "nf4":
            scales = (1 + 4 / NF4_SECOND_BLOCK if double_quantization else 4) / NF4_BLOCK
            return rest + linear * (0.5 + scales)
        case "int8":
            return rest + linear + sum(4 * weight.shape[0] for weight in shape.quantizable())
    return rest + linear * shape.dtype.itemsize


def sharded_weight_bytes(shape: Skeleton, quantization: str, double_quantization: bool, learners: int) -> float:
    """The frozen base as one of several learners holds it with `train.shard_base`.

    Its part of the weights of the blocks, a block of them whole while that computes, and everything else.
    """
    each = 0.5 if quantization == "nf4" else shape.dtype.itemsize
    linear = {id(weight) for weight in shape.quantizable()}
    blocks = [
        sum(
            p.numel() * (each if id(p) in linear else shape.dtype.itemsize)
            for p in block.parameters()
            if not p.requires_grad
        )
        for block in transformer_blocks(shape.base)
    ]
    whole = weight_bytes(shape, quantization, double_quantization)
    return whole - sum(blocks) * (1 - 1 / learners) + max(blocks, default=0.0)


def dequantization_bytes(shape: Skeleton) -> float:
    """The largest linear layer in the precision of the computation, which a 4-bit layer makes of itself when used."""
    return max(weight.numel() for weight in shape.quantizable()) * shape.dtype.itemsize


def activation_bytes(shape: Skeleton, sequences: int, prompt: int, response: int, checkpointing: bool) -> float:
    """What a training pass keeps for its backward pass, below the language-model head.

    Of `sequences` with a prompt and a response of so many tokens. With checkpointing the inputs of every block are
    kept, and one block at a time is kept whole.
    """
    kept = _kept_bytes(shape, sequences, prompt, response)
    if not checkpointing:
        return kept
    config = shape.base.config
    inputs = config.num_hidden_layers * sequences * (prompt + response) * config.hidden_size * shape.dtype.itemsize
    return inputs + kept / config.num_hidden_layers


def logits_bytes(shape: Skeleton, predictions: int) -> float:
    """Logits of `predictions` positions in `dtype` and float32 with the gradient of the latter, chunk by chunk."""
    numbers = min(predictions * shape.base.config.vocab_size, MAX_LOGITS)
    return numbers * (shape.dtype.itemsize + 4 + 4)


def cache_bytes_per_token(shape: Skeleton) -> float:
    """Keys and values of one token in every layer, in `dtype`."""
    config = shape.base.config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False):
        key_heads = config.num_kv_heads if getattr(config, "new_decoder_architecture", False) else 1
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * key_heads * head_size * shape.dtype.itemsize


def _kept_bytes(shape: Skeleton, sequences: int, prompt: int, response: int) -> int:
    own = {_storage(tensor) for tensor in (*shape.model.parameters(), *shape.model.buffers())}
    # Held until the end, so that no storage is freed and its identity used again.
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor
        return tensor

    shape.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        try:
            _run_trunk(shape.base, sequences, prompt, response)
        except RuntimeError:
            # Some models look at the numbers of a mask they make themselves; one that is given is used as it is.
            kept.clear()
            length = prompt + response
            mask = torch.zeros(sequences, 1, length, length, dtype=shape.dtype, device="meta")
            own.add(_storage(mask))
            _run_trunk(shape.base, sequences, prompt, response, attention_mask=mask)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _run_trunk(base: Any, sequences: int, prompt: int, response: int, **mask: Tensor) -> None:
    """A forward pass on shapes, as `response_states` makes it on tokens."""
    if base.config.is_encoder_decoder:
        ids, answer = (torch.zeros(sequences, n, dtype=torch.long, device="meta") for n in (prompt, response))
        encoded = base.get_encoder()(input_ids=ids).last_hidden_state
        base.get_decoder()(input_ids=answer, encoder_hidden_states=encoded, use_cache=False)
        return
    trunk = getattr(base, base.base_model_prefix)
    ids = torch.zeros(sequences, prompt + response, dtype=torch.long, device="meta")
    trunk(input_ids=ids, use_cache=False, **mask)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
