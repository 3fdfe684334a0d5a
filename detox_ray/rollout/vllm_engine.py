"""Rollout engine on vLLM, in process. Import this module only where vLLM is meant to run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

# vLLM reads these when it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from vllm import LLM, SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.utils.torch_utils import set_random_seed

from detox_ray.policy.adapter import Adapter, save_adapter
from detox_ray.records import Prompt, Rollout, Sampling
from detox_ray.rollout.engine import CANARY_TOP, EngineSpec
from detox_ray.rollout.merge import load_pristine_weights, merged_weights


class VllmEngine:
    """vLLM's `LLM` with exact adapter pushes.

    `adapter`: every version is a LoRA of its own name, id and path, so no cached block serves another version.
    `merged`: the weights are reloaded from the pristine ones plus the adapter and the prefix cache is emptied.

    With `tensor_parallel` above 1 the model lives in as many processes of its own, each with its shard of every weight.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.version = -1
        self._spec = spec
        self._lora: LoRARequest | None = None
        options: dict[str, Any] = {"dtype": spec.dtype}
        if spec.tensor_parallel > 1:
            # Not Ray's executor, which vLLM takes inside an actor: this actor has the devices already.
            options |= {"tensor_parallel_size": spec.tensor_parallel, "distributed_executor_backend": "mp"}
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if spec.sync == "adapter":
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank_bucket(spec.lora_rank)}
        self._llm = LLM(
            model=spec.model,
            revision=spec.revision,
            max_model_len=spec.max_length,
            max_num_seqs=spec.max_num_seqs,
            kv_cache_memory_bytes=spec.kv_cache_mib * 2**20,
            enforce_eager=not torch.cuda.is_available(),
            # The cache's size is given above. What is left of this option is a check that so much of the GPU is free,
            # which fails beside a learner or a second worker.
            gpu_memory_utilization=0.01,
            # CPUs have no such mode, but take the calls.
            enable_sleep_mode=spec.in_turns and torch.cuda.is_available(),
            disable_log_stats=True,
            trust_remote_code=False,
            logprobs_mode="processed_logprobs",
            **options,
        )
        if spec.sync == "merged":
            self._on_every_rank(_keep_pristine_weights, spec.model, spec.revision)
        self._tokenizer: Any = self._llm.get_tokenizer()

    def generate(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling) -> Iterator[tuple[int, Rollout]]:
        """See `RolloutEngine.generate`."""
        self._wake()
        # The engine samples from its processes' generators: the same call on the same engine gives the same responses.
        self._on_every_rank(_seed, sampling.seed)
        params = SamplingParams(
            n=samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            min_tokens=sampling.max_new_tokens if sampling.fixed_length else 0,
            stop_token_ids=list(self._spec.end_ids),
            logprobs=0,
            detokenize=False,
        )
        for index, output in self._run([p.token_ids for p in prompts], params):
            for sample, completion in enumerate(output.outputs):
                yield index * samples + sample, self._rollout(prompts[index], completion)

    def _rollout(self, prompt: Prompt, completion: Any) -> Rollout:
        logprobs = [step[token].logprob for token, step in zip(completion.token_ids, completion.logprobs, strict=True)]
        return Rollout(
            prompt_id=prompt.id,
            prompt_text=prompt.text,
            prompt_ids=np.asarray(prompt.token_ids, dtype=np.int64),
            response_ids=np.asarray(completion.token_ids, dtype=np.int64),
            logprobs=np.asarray(logprobs, dtype=np.float32),
            text=self._tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            finish_reason=completion.finish_reason,
            adapter_version=self.version,
        )

    def apply(self, adapter: Adapter) -> None:
        """See `RolloutEngine.apply`."""
        self._wake()
        if self._spec.sync == "merged":
            self._on_every_rank(_serve_merged, adapter)
            self._llm.reset_prefix_cache()
        else:
            # The folder is needed for as long as vLLM reads it, and an engine may be killed at any later time.
            with TemporaryDirectory(prefix="detox_ray-adapter-") as scratch:
                folder = Path(scratch) / f"v{adapter.version}"
                save_adapter(adapter, folder)
                request = LoRARequest(folder.name, adapter.version + 1, str(folder))
                self._llm.llm_engine.add_lora(request)
            if self._lora is not None:
                self._llm.llm_engine.remove_lora(self._lora.lora_int_id)
            self._lora = request
        self.version = adapter.version

    def next_token_logprobs(self, prefixes: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """See `RolloutEngine.next_token_logprobs`."""
        self._wake()
        params = SamplingParams(temperature=1.0, max_tokens=1, logprobs=CANARY_TOP, detokenize=False)
        outputs = dict(self._run(prefixes, params))
        answers = [outputs[index].outputs[0].logprobs[0] for index in range(len(prefixes))]
        return [{token: entry.logprob for token, entry in answer.items()} for answer in answers]

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`: the weights go to main memory, the cache is forgotten."""
        with self._exiting_if_a_rank_died():
            self._llm.sleep(level=1)

    def _wake(self) -> None:
        if self._llm.llm_engine.is_sleeping():
            with self._exiting_if_a_rank_died():
                self._llm.wake_up()

    def _run(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[tuple[int, Any]]:
        """Each prompt's index and vLLM's output for it, as they finish."""
        requests = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        engine = self._llm.llm_engine
        with self._exiting_if_a_rank_died():
            # Within vLLM a request's number has a random ending, which its output has not.
            names = self._llm.enqueue(requests, params, use_tqdm=False, lora_request=self._lora)
            indexes = {name.partition("-")[0]: index for index, name in enumerate(names)}
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            yield indexes[output.request_id], output
            finally:
                if engine.has_unfinished_requests():  # an error has left some, which the next call would meet
                    engine.abort_request(names, internal=True)

    def _on_every_rank(self, function: Any, *arguments: Any) -> None:
        with self._exiting_if_a_rank_died():
            self._llm.collective_rpc(function, args=arguments)

    @contextmanager
    def _exiting_if_a_rank_died(self) -> Iterator[None]:
        """Where a process with a shard of the model has died, end this one too: Ray starts the worker anew."""
        try:
            yield
        except RuntimeError:
            if self._spec.tensor_parallel > 1 and self._llm.llm_engine.model_executor.is_failed:
                os._exit(1)
            raise


# What follows runs in every process that holds a shard of the model, with vLLM's worker there.


def _keep_pristine_weights(worker: Any, model: str, revision: str | None) -> None:
    worker.pristine = load_pristine_weights(model, revision)


def _serve_merged(worker: Any, adapter: Adapter) -> None:
    worker.model_runner.reload_weights(weights_iterator=merged_weights(worker.pristine, adapter))


def _seed(_: Any, seed: int) -> None:
    set_random_seed(seed)  # torch's generators; on GPUs vLLM takes each request's seed from NumPy's


def _lora_rank_bucket(rank: int) -> int:
    """The smallest rank of those vLLM has kernels for that holds `rank`."""
    return min(size for size in get_args(MaxLoRARanks) if size >= rank)
