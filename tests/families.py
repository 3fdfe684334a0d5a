"""A tiny random model of every decoder-only family of the field, in hub format."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
NEO: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
BLOCKS: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA: dict[str, Any] = {
    **BLOCKS,
    "intermediate_size": 128,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": NEO,
    "GPTJ": {**NEO, "rotary_dim": 16},
    "GPTNeo": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "GPTNeoX": {**BLOCKS, "intermediate_size": 128},
    "Falcon": BLOCKS,
    "OPT": {**BLOCKS, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "Llama": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": {**LLAMA, "head_dim": 32},
}


def save_family(family: str, folder: Path) -> str:
    """Write the family's model and a tokenizer of characters as a hub would serve them; returns the folder's name."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character; `<eos>` is also the start token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(c) for c in range(32, 32 + VOCABULARY - 3)]
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
