"""What decoder-only and encoder-decoder models do differently: how a prompt and a response become predictions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from detox_ray.policy.sequences import Sequences

# The model types whose head `language_model_head` applies as the model does: others scale, add or shift otherwise.
ENCODER_DECODERS = ("t5", "mt5")


def language_model_class(model_config: Any) -> Any:
    """The `transformers` class that loads a model of this configuration with its language-model head."""
    return AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM


def adapter_task(model_config: Any) -> str:
    """What PEFT calls the task of an adapter for such a model."""
    return "SEQ_2_SEQ_LM" if model_config.is_encoder_decoder else "CAUSAL_LM"


def response_states(model: Any, sequences: Sequences) -> Tensor:
    """[B, R, H]: the trunk's last hidden state where each response token is predicted.

    Entries past a response's end are undefined. A decoder-only model reads prompt and response in one; of an
    encoder-decoder the encoder reads the prompt, and the decoder its start token and the response.
    """
    if model.config.is_encoder_decoder:
        prompts, is_prompt = sequences.prompts()
        encoded = model.get_encoder()(input_ids=prompts, attention_mask=is_prompt).last_hidden_state
        decoded = model.get_decoder()(
            input_ids=sequences.decoder_ids(model.config.decoder_start_token_id),
            encoder_hidden_states=encoded,
            encoder_attention_mask=is_prompt,
            use_cache=False,
        )
        return decoded.last_hidden_state
    trunk = getattr(model, model.base_model_prefix)
    return _at_predictors(trunk(input_ids=sequences.input_ids, use_cache=False).last_hidden_state, sequences)


def language_model_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states [N, H] -> logits [N, V]."""
    head = model.get_output_embeddings()
    if getattr(model.config, "scale_decoder_outputs", False):
        # The first T5, whose head is its embedding matrix (Raffel et al. 2020); later ones have a head of their own.
        return lambda hidden: head(hidden * model.config.d_model**-0.5)
    return head


def response_logits(model: Any, sequences: Sequences) -> Tensor:
    """[B, R, V]: each response token's logits by the model itself; entries past a response's end are undefined."""
    if model.config.is_encoder_decoder:
        prompts, is_prompt = sequences.prompts()
        decoder_ids = sequences.decoder_ids(model.config.decoder_start_token_id)
        return model(input_ids=prompts, attention_mask=is_prompt, decoder_input_ids=decoder_ids, use_cache=False).logits
    return _at_predictors(model(input_ids=sequences.input_ids, use_cache=False).logits, sequences)


def next_token_logits(model: Any, prefix: Sequence[int]) -> Tensor:
    """[V]: what follows `prefix`; where there is an encoder, what follows it as a response to itself."""
    ids = torch.tensor([list(prefix)], device=model.device)
    if not model.config.is_encoder_decoder:
        return model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
    start = ids.new_full((1, 1), model.config.decoder_start_token_id)
    return model(input_ids=ids, decoder_input_ids=torch.cat([start, ids], dim=1)).logits[0, -1].float()


def _at_predictors(outputs: Tensor, sequences: Sequences) -> Tensor:
    """Of [B, T, ...] over whole sequences what stands at the predictor of each response token."""
    rows = torch.arange(outputs.shape[0], device=outputs.device)[:, None]
    return outputs[rows, sequences.predictor_positions()]
