"""Load a base model and its tokenizer, quantised or not, and write the dequantised twin that engines serve."""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.falcon import modeling_falcon
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import is_bitsandbytes_available

from detox_ray.config import PolicyConfig
from detox_ray.errors import ModelError
from detox_ray.hub import why_not_loaded
from detox_ray.policy.architecture import ENCODER_DECODERS, language_model_class


def load_tokenizer(config: PolicyConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, with a pad token.

    Raises:
        ModelError: it cannot be loaded, or has no pad token and `policy.pad_token` names none; or it ends texts that a
            decoder-only model is to continue.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_cannot_load("tokenizer", config.model, error)) from None
    if config.pad_token is not None:
        if config.pad_token not in tokenizer.get_vocab():
            raise ModelError(
                f"policy.pad_token={config.pad_token!r} is not a token of {config.model}; name one that is"
            )
        tokenizer.pad_token = config.pad_token
    ends_texts = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    if ends_texts and not load_model_config(config).is_encoder_decoder:
        raise ModelError(
            f"tokenizer of {config.model} writes {tokenizer.eos_token} behind every text, and a decoder-only model has "
            "to continue them; set add_eos_token to false in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        usual = tokenizer.eos_token or tokenizer.unk_token or "<pad>"
        raise ModelError(f"tokenizer of {config.model} has no pad token; set one, such as policy.pad_token={usual!r}")
    return tokenizer


def load_model_config(config: PolicyConfig) -> Any:
    """The model's `transformers` configuration with every dropout at 0, so that a PPO ratio compares equal functions.

    Raises:
        ModelError: it cannot be loaded, or is of an encoder-decoder other than T5 or without a start token.
    """
    try:
        model_config = AutoConfig.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_cannot_load("model", config.model, error)) from None
    if model_config.is_encoder_decoder:
        _check_encoder_decoder(config.model, model_config)
    for key, value in vars(model_config).items():
        if isinstance(value, float) and ("dropout" in key or "pdrop" in key):
            setattr(model_config, key, 0.0)
    return model_config


def _check_encoder_decoder(model: str, model_config: Any) -> None:
    if model_config.model_type not in ENCODER_DECODERS:
        raise ModelError(
            f"policy.model={model} is an encoder-decoder of type {model_config.model_type}; "
            f"use one of type {' or '.join(ENCODER_DECODERS)}, or a decoder-only model"
        )
    if getattr(model_config, "decoder_start_token_id", None) is None:
        raise ModelError(
            f"policy.model={model} is an encoder-decoder, and its config.json has no decoder_start_token_id; "
            "set it (T5's is its pad token)"
        )


def end_token_ids(config: PolicyConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's end token and those of the model's generation configuration."""
    try:
        ends = GenerationConfig.from_pretrained(config.model, revision=config.revision or "main").eos_token_id
    except OSError:
        ends = None
    listed = ends if isinstance(ends, list) else [ends]
    return tuple(sorted({end for end in [*listed, tokenizer.eos_token_id] if end is not None}))


def check_quantization(config: PolicyConfig) -> None:
    """Refuse a quantised base on a machine that cannot quantise.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if config.quantization != "none" and not is_bitsandbytes_available():
        raise ModelError(
            f"policy.quantization={config.quantization} needs bitsandbytes, which is not installed here; "
            "set policy.quantization=none, or pip install bitsandbytes"
        )


def compute_dtype(config: PolicyConfig, device: torch.device) -> torch.dtype:
    """`policy.compute_dtype`, with auto resolved for the device."""
    if config.compute_dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, config.compute_dtype)


def load_base(config: PolicyConfig, device: torch.device, loaded_on: torch.device | None = None) -> PreTrainedModel:
    """The frozen base for computations on `device`, there or on `loaded_on`, quantised as configured.

    Raises:
        ModelError: it cannot be loaded, has weights in no safetensors file, or cannot be quantised.
    """
    check_quantization(config)
    # bitsandbytes is given no subclasses of nn.Linear; Falcon's computes what nn.Linear does.
    setattr(modeling_falcon, "FalconLinear", nn.Linear)  # noqa: B010 - a class, not a variable, to the type checker
    dtype = compute_dtype(config, device)
    quantization = None
    if config.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    elif config.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    try:
        model_config = load_model_config(config)
        model = language_model_class(model_config).from_pretrained(
            config.model,
            config=model_config,
            revision=config.revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": loaded_on or device},
            attn_implementation=_attention(device, dtype),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_cannot_load("model", config.model, error)) from None
    if quantization is not None and not any(hasattr(module, "source_cls") for module in model.modules()):
        raise ModelError(
            f"policy.quantization={config.quantization}: bitsandbytes can quantise no layer of {type(model).__name__}; "
            "use none"
        )
    _keep_gradients_right_on_cpu(model)
    return model.requires_grad_(False)


def _attention(device: torch.device, dtype: torch.dtype) -> str | None:
    """None for the model's own choice, which on CPU has a slow backward pass in bfloat16 (torch 2.13)."""
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a checkpoint has the module's weight as GPT-2 does, [in, out]; also when the module is quantised."""
    return getattr(module, "source_cls", type(module)) is Conv1D


def _keep_gradients_right_on_cpu(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in a scoring pass on AVX512-BF16 CPUs.

    The repacked weights give a right loss and wrong gradients ever after (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - no declared attribute of nn.Module


def _transpose(linear: Any) -> None:
    linear.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)


def write_dequantized_base(config: PolicyConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> Path:
    """Write the quantised base, dequantised once, as a plain checkpoint: what the learner computes.

    It is dequantised on `device` and written in `dtype`, that of the learner's computations. Does nothing when `folder`
    is there already; a killed write leaves nothing that looks complete.
    """
    if folder.exists():
        return folder
    # As the learner loads it, wherever this runs: the weights are rounded to `dtype`, then quantised.
    as_learner = config.model_copy(update={"compute_dtype": str(dtype).removeprefix("torch.")})
    model: Any = load_base(as_learner, device)
    transposed = [name for name, module in model.named_modules() if is_conv1d(module)]
    model = model.dequantize().to(dtype)
    for name in transposed:
        _transpose(model.get_submodule(name))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    del model
    gc.collect()  # a quantised weight and its layer refer to each other
    torch.cuda.empty_cache()  # the device is the engines' and the learners' from here on
    load_tokenizer(config).save_pretrained(scratch)
    os.replace(scratch, folder)
    return folder


def _cannot_load(what: str, model: str, error: Exception) -> str:
    if not Path(model).exists() and (model.startswith(("/", ".", "~")) or model.count("/") != 1):
        return f"policy.model={model}: no such folder; give a folder in Hugging Face format or a hub id"
    return f"policy.model={model}: its {what} cannot be loaded: {why_not_loaded(model, error)}"
