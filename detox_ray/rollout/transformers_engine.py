"""Rollout engine on `transformers`' own `generate`: for architectures and platforms that vLLM does not serve."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from detox_ray.errors import ModelError, SyncError
from detox_ray.hub import why_not_loaded
from detox_ray.policy.adapter import Adapter
from detox_ray.policy.adapter_weights import write_weights
from detox_ray.policy.architecture import language_model_class, next_token_logits
from detox_ray.records import Prompt, Rollout, Sampling
from detox_ray.rollout.engine import CANARY_TOP, EngineSpec


class TransformersEngine:
    """A PEFT model whose adapter is replaced in place."""

    def __init__(self, spec: EngineSpec) -> None:
        self.version = -1
        self._spec = spec
        self._device = torch.device(spec.device)
        source: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": False}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(spec.model, **source)
            model_config = AutoConfig.from_pretrained(spec.model, **source)
            model: Any = language_model_class(model_config).from_pretrained(
                spec.model, dtype=getattr(torch, spec.dtype), use_safetensors=True, **source
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{spec.model} cannot be loaded: {why_not_loaded(spec.model, error)}") from None
        # What `generate` is not told it takes from here: say a repetition penalty, of which the learner knows nothing.
        model.generation_config = GenerationConfig()
        self._model: Any = model.to(self._device).eval()

    def generate(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> Iterator[tuple[int, Rollout]]:
        """See `RolloutEngine.generate`."""
        self._wake()
        torch.manual_seed(sampling.seed)
        rows = [prompt for prompt in prompts for _ in range(samples)]
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].token_ids))
        for start in range(0, len(rows), self._spec.max_num_seqs):
            chosen = by_length[start : start + self._spec.max_num_seqs]
            yield from zip(chosen, self._generate_batch([rows[i] for i in chosen], sampling), strict=True)

    @torch.inference_mode()
    def _generate_batch(self, prompts: list[Prompt], sampling: Sampling) -> list[Rollout]:
        is_encoder_decoder = self._model.config.is_encoder_decoder
        longest = max(len(p.token_ids) for p in prompts)
        input_ids = torch.full((len(prompts), longest), self._spec.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            attention_mask[row, longest - len(prompt.token_ids) :] = 1
        output = self._model.generate(
            input_ids=input_ids.to(self._device),
            attention_mask=attention_mask.to(self._device),
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_new_tokens=sampling.max_new_tokens,
                min_new_tokens=sampling.max_new_tokens if sampling.fixed_length else None,
                eos_token_id=list(self._spec.end_ids) or None,
                pad_token_id=self._spec.pad_id,
                decoder_start_token_id=self._model.config.decoder_start_token_id if is_encoder_decoder else None,
                return_dict_in_generate=True,
                output_scores=True,
            ),
        )
        # What `generate` returns begins with the prompt, or with the decoder's start token.
        response_ids = output.sequences[:, 1 if is_encoder_decoder else longest :]
        steps = [
            scores.float().log_softmax(dim=1).gather(1, response_ids[:, step : step + 1])[:, 0]
            for step, scores in enumerate(output.scores)
        ]
        logprobs = torch.stack(steps, dim=1).cpu().numpy()
        return [
            self._rollout(prompt, ids, row, sampling)
            for prompt, ids, row in zip(prompts, response_ids.cpu().numpy(), logprobs, strict=True)
        ]

    def _rollout(self, prompt: Prompt, ids: np.ndarray, logprobs: np.ndarray, sampling: Sampling) -> Rollout:
        ends = np.flatnonzero(np.isin(ids, self._spec.end_ids))
        length = int(ends[0]) + 1 if len(ends) else min(len(ids), sampling.max_new_tokens)
        return Rollout(
            prompt_id=prompt.id,
            prompt_text=prompt.text,
            prompt_ids=np.asarray(prompt.token_ids, dtype=np.int64),
            response_ids=ids[:length].astype(np.int64),
            logprobs=logprobs[:length].astype(np.float32),
            text=self._tokenizer.decode(ids[:length], skip_special_tokens=True),
            finish_reason="stop" if len(ends) else "length",
            adapter_version=self.version,
        )

    def apply(self, adapter: Adapter) -> None:
        """See `RolloutEngine.apply`."""
        self._wake()
        try:
            if self.version == -1:
                self._model = get_peft_model(self._model, LoraConfig(**_lora_options(adapter))).eval()
            write_weights(self._model, adapter)
        except (ModelError, ValueError) as error:
            raise SyncError(str(error)) from None
        self.version = adapter.version

    @torch.inference_mode()
    def next_token_logprobs(self, prefixes: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """See `RolloutEngine.next_token_logprobs`."""
        self._wake()
        answers = []
        for prefix in prefixes:
            top = next_token_logits(self._model, prefix).log_softmax(dim=0).topk(CANARY_TOP)
            answers.append(dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        return answers

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`: the weights go to main memory."""
        self._model.to("cpu")
        torch.cuda.empty_cache()

    def _wake(self) -> None:
        self._model.to(self._device)


def _lora_options(adapter: Adapter) -> dict[str, Any]:
    keys = ("r", "lora_alpha", "target_modules", "fan_in_fan_out", "use_rslora", "task_type", "bias")
    return {key: adapter.peft_config[key] for key in keys}
