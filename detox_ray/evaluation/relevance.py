"""Whether a response is about its prompt: cosine similarity of their embeddings by a sentence encoder."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from detox_ray.errors import DataError, ModelError
from detox_ray.hub import why_not_loaded

MAX_TOKENS = 512


class SentenceEncoder:
    """A transformers encoder with safetensors weights, in a folder or on the hub (at `revision`).

    The embedding of a text is the mean of the last hidden states of its tokens, special tokens included, as
    sentence-transformers makes it (Reimers and Gurevych 2019); texts are cut to the tokens that the encoder can read,
    at most 512.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        """Raises:
        ModelError: the model cannot be loaded or is no encoder.
        """
        self.model = model
        self._tokenizer, self._encoder = _load_encoder(model, revision)

    def similarity(self, prompts: Sequence[str], responses: Sequence[str], batch_size: int) -> np.ndarray:
        """Cosine similarity of each response with its prompt, [N] float64 in [-1, 1]; 0 where one has no visible text.

        Raises:
            DataError: different numbers of prompts and responses.
        """
        if len(prompts) != len(responses):
            raise DataError(f"{len(prompts)} prompts for {len(responses)} responses: give one prompt per response")
        # Prompts with many responses are embedded once.
        texts = sorted({text for text in (*prompts, *responses) if text.strip()})
        row_of = {text: row for row, text in enumerate(texts)}
        units = _unit_embeddings(self._tokenizer, self._encoder, texts, batch_size)
        pairs = [(row_of.get(p), row_of.get(r)) for p, r in zip(prompts, responses, strict=True)]
        cosines = [0.0 if p is None or r is None else float(units[p] @ units[r]) for p, r in pairs]
        return np.array(cosines, dtype=np.float64)


def _load_encoder(model: str, revision: str | None) -> tuple[Any, Any]:
    """Tokenizer and encoder, in evaluation mode, on a GPU where there is one.

    Raises:
        ModelError: it cannot be loaded, lacks weights or a pad token, or is not an encoder alone.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        kind = config.model_type
        next_token_only = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if config.is_encoder_decoder or next_token_only:
            raise ModelError(f"relevance model {model!r} is a {kind}, not an encoder; name one such as a BERT")
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        encoder, loading = AutoModel.from_pretrained(
            model,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"relevance model {model!r} does not load as a transformers encoder: {why_not_loaded(model, error)}"
        ) from None
    # The pooler is a head for other tasks; many sentence encoders are published without it.
    if missing := sorted(name for name in loading["missing_keys"] if "pooler" not in name):
        raise ModelError(f"relevance model {model!r} has no trained weights for {', '.join(missing[:3])}; name another")
    if tokenizer.pad_token_id is None:
        raise ModelError(f"relevance model {model!r}: its tokenizer has no pad token; name a sentence encoder")
    tokenizer.padding_side = "right"
    return tokenizer, encoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _unit_embeddings(tokenizer: Any, encoder: Any, texts: list[str], batch_size: int) -> np.ndarray:
    """[N, H] float64 of length 1; texts of similar length share a batch."""
    import torch

    limit = min(MAX_TOKENS, tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", MAX_TOKENS))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    embeddings = np.zeros((len(texts), encoder.config.hidden_size))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt"
            ).to(encoder.device)
            hidden = encoder(**batch).last_hidden_state.double()
            mask = batch["attention_mask"][:, :, None].double()
            embeddings[rows] = ((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).cpu().numpy()
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
