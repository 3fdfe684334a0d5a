"""PPO samples a second on a random-weight model of RedPajama-INCITE-3B's shape; RewardLM's log has 0.36 on an A100.

    python benchmarks/redpajama_step.py [--steps N] [--quick] [--folder FOLDER] [--out FILE]

The settings are those of `configs/redpajama-3b.yaml`: batches of 64, 70 new tokens, NF4, LoRA r=64 on query_key_value,
gradient checkpointing, 2 epochs x 2 minibatches. What is real: the learner, the transformers engine on the dequantised
base and the adapter's way from one to the other, whose log-probabilities must agree in every step. What is not: Ray,
the classifier (a second of RewardLM's 190 a step; rewards are drawn at random here) and the weights, which cost the
same time as trained ones. Every response has 70 tokens. It needs one GPU; without one `--quick` shows that it works.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe, machine, spread, write_json
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from detox_ray import load_config
from detox_ray.config import Config
from detox_ray.learner.ppo import PPO, SamplingDistribution
from detox_ray.policy.load import compute_dtype, write_dequantized_base
from detox_ray.policy.policy import Policy
from detox_ray.records import Prompt, Sampling
from detox_ray.rollout.engine import EngineSpec, in_order
from detox_ray.rollout.transformers_engine import TransformersEngine

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
VOCABULARY, END, PAD = 50_432, 0, 1
PROMPT_TOKENS = 24
REWARDLM = 0.36  # samples a second, one A100-40GB


def main() -> None:
    """Make the model, run the steps, print and write what they took."""
    options = _options()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.quick:
        raise SystemExit("no GPU here: a step of the whole model would take hours; --quick takes a small one")
    facts = machine(PACKAGES) | {"gpu": torch.cuda.get_device_name() if device.type == "cuda" else None}
    print(describe(facts), facts["gpu"] or "no GPU")
    with torch.device("meta"):
        parameters = GPTNeoXForCausalLM(_shape(options)).num_parameters()
    config = load_config(ROOT / "configs/redpajama-3b.yaml", [f"policy.model={_save_model(options, device)}"])
    policy = Policy(config.policy, device, config.seed)
    engine = _engine(config, device)
    distribution = SamplingDistribution(config.rollout.temperature, (END,), 1, config.rollout.max_logprob_gap)
    ppo = PPO(policy, config.ppo, distribution, PAD, options.steps + 1, config.seed)
    lines = [_step(config, ppo, engine, step) for step in range(options.steps + 1)][1:]  # the first warms up
    seconds = [sum(line[phase] for phase in ("rollout_s", "learn_s", "push_s")) for line in lines]
    samples_per_s = [config.ppo.batch_size / s for s in seconds]
    spreads = {"samples_per_s": spread(samples_per_s)} | {
        key: spread([line[key] for line in lines]) for key in lines[0]
    }
    print(f"{parameters:,} parameters, {len(lines)} steps of {config.ppo.batch_size} responses; medians (min - max):")
    for key, found in spreads.items():
        print(f"  {key} {found['median']:.3g} ({found['min']:.3g} - {found['max']:.3g})")
    if device.type == "cuda":
        spreads["gpu_memory_gib"] = spread([torch.cuda.max_memory_allocated() / 2**30])
        print(f"  {spreads['gpu_memory_gib']['median']:.1f} GiB of the GPU")
    if not options.quick:
        print(f"  {spreads['samples_per_s']['median'] / REWARDLM:.3g} x RewardLM's samples a second")
    result = {"machine": facts, "parameters": parameters, "batch": config.ppo.batch_size, **spreads}
    write_json(options.out, result)
    print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="measured, after one to warm up (3)")
    parser.add_argument("--quick", action="store_true", help="one step of a model of 2 narrow layers: does it work?")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/redpajama-shape"), help="for the weights")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/redpajama_step.json"), help="the JSON file")
    options = parser.parse_args()
    options.layers, options.hidden, options.heads = (2, 256, 4) if options.quick else (32, 2560, 32)
    if options.quick:
        options.steps = 1
    return options


def _shape(options: argparse.Namespace) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        use_parallel_residual=False,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
    )


def _save_model(options: argparse.Namespace, device: torch.device) -> Path:
    """Random weights of the shape, with a tokenizer of as many words, as a folder in Hugging Face format."""
    folder = options.folder / f"{options.layers}x{options.hidden}"
    if (folder / "tokenizer.json").exists():
        return folder
    torch.manual_seed(0)
    with device:
        model: Any = GPTNeoXForCausalLM(_shape(options))
    model.to(torch.bfloat16).save_pretrained(folder)
    words = {"<|endoftext|>": END, "<|padding|>": PAD, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|padding|>"
    ).save_pretrained(folder)
    return folder


def _engine(config: Config, device: torch.device) -> TransformersEngine:
    dtype = compute_dtype(config.policy, device)
    base = write_dequantized_base(config.policy, Path(f"{config.policy.model}-dequantized"), device, dtype)
    return TransformersEngine(
        EngineSpec(
            kind="transformers",
            sync="adapter",
            model=str(base),
            revision=None,
            dtype=str(dtype).removeprefix("torch."),
            max_length=PROMPT_TOKENS + config.rollout.max_new_tokens,
            end_ids=(END,),
            pad_id=PAD,
            lora_rank=config.policy.lora.rank,
            max_num_seqs=config.rollout.max_num_seqs,
            kv_cache_mib=config.rollout.kv_cache_mib,
            device="cuda" if device.type == "cuda" else "cpu",
        )
    )


def _step(config: Config, ppo: PPO, engine: TransformersEngine, step: int) -> dict[str, Any]:
    """A push, a batch and an update; seconds of each, and how far engine and learner are apart, in nats."""
    started = time.perf_counter()
    engine.apply(ppo.policy.adapter(step))
    pushed = time.perf_counter()
    rng = np.random.default_rng(step)
    prompts = [
        Prompt(f"{step}-{n}", "", tuple(int(i) for i in rng.integers(2, VOCABULARY, PROMPT_TOKENS)))
        for n in range(config.ppo.batch_size)
    ]
    sampling = Sampling(config.rollout.max_new_tokens, fixed_length=True, seed=step)
    rollouts = in_order(engine.generate(prompts, 1, sampling))
    sampled = time.perf_counter()
    rewards = rng.normal(size=len(rollouts)).astype(np.float32)
    metrics = ppo.update(rollouts, rewards, step, on_policy=True)
    return {
        "push_s": pushed - started,
        "rollout_s": sampled - pushed,
        "learn_s": time.perf_counter() - sampled,
        "logprob_gap_mean": metrics["logprob_gap_mean"],
    }


if __name__ == "__main__":
    main()
