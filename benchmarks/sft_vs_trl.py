"""Real tokens a second in fine-tuning: a `detox-ray sft` run against TRL's SFTTrainer, in turn, in one command.

    python benchmarks/sft_vs_trl.py [--model FOLDER] [--data FILE] [--steps N] [--rounds N] [--threads N] [--quick]
                                    [--same-allocator]

TRL gets an environment of its own, `.venv-trl-sft`, made here when missing. Both sides have:

    the same model, float32, no quantisation, LoRA r=16 on all linear layers, dropout 0
    the same examples as token ids with the same labels: only responses are learned; each is used once
    32 examples an optimiser step, AdamW, the same constant learning rate, gradients clipped to norm 1
    the same number of threads; start-up, evaluation and warm-up steps left out; padding is not counted as tokens

What differs, because it is how each is made:

    batches     ours: examples of similar length (as the product makes them), cut into passes of at most
                `train.microbatch_tokens`. TRL: by its options, below.
    logits      both make those of response tokens only, in chunks.
    allocator   ours sets glibc's allocator not to give memory back (part of the product); TRL runs with the
                environment as it is, unless --same-allocator gives it the same settings.
    process     ours is a Ray Train worker; a step of TRL's includes its metrics and log line.

TRL is measured with several options; what counts is the fastest:

    defaults      as SFTConfig comes: random batches, gradient checkpointing
    random        without gradient checkpointing
    grouped       examples of similar length together, one pass a step (TRL sorts within up to a quarter of the batches)
    grouped x 4   the same in four passes of eight examples
    padding-free  the examples of a pass in one row, apart by their positions
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

from detox_ray.learner.sft import WINDOW

PACKAGES = ("torch", "transformers", "peft", "ray")
BATCH, LORA_RANK, LEARNING_RATE = 32, 16, 3e-4
MICROBATCH_TOKENS = 1024  # of 512 to 4,096 the fastest here; TRL's "grouped x 4" has about as many in a pass
ONE_PASS = {"per_device_train_batch_size": BATCH, "gradient_checkpointing": False}
TRL_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"per_device_train_batch_size": BATCH},
    "random": ONE_PASS,
    "grouped": {**ONE_PASS, "train_sampling_strategy": "group_by_length"},
    "grouped x 4": {
        "per_device_train_batch_size": BATCH // 4,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
    },
    "padding-free": {**ONE_PASS, "padding_free": True, "max_length": None},
}
OURS = "detox_ray"


def main() -> None:
    """Measure all in turn, print the table, write the JSON."""
    options = _options()
    console = Console()
    python = trl_python("trl_sft", console)
    facts = machine(PACKAGES)
    console.print(describe(facts))
    config = _config(options)
    task = _prepare(config)
    systems = [OURS, *(f"TRL {name}" for name in options.trl)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    with tempfile.TemporaryDirectory(prefix="detox_ray-benchmark-") as scratch:
        for number in range(1, options.rounds + 1):
            for name in systems:
                folder = Path(scratch) / f"{name}-{number}"
                folder.mkdir()
                if name == OURS:
                    result = _run_ours(config, folder, options)
                else:
                    own = {"seed": number, "options": TRL_OPTIONS[name.removeprefix("TRL ")]}
                    result = _run_trl(python, task | own, folder, options)
                runs[name].append(_summary(name, result, options.warmup))
                console.print(
                    f"round {number} of {options.rounds}: {name} {runs[name][-1]['tokens_per_s']:,.0f} tokens/s"
                )
    fastest = max(systems[1:], key=lambda name: spread([r["tokens_per_s"] for r in runs[name]])["median"])
    ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(runs[OURS], runs[fastest], strict=True)]
    result = {
        "machine": facts,
        "model": Path(task["model"]).name,
        "same_allocator": options.same_allocator,
        "threads": options.threads,
        "measured_steps": options.steps,
        "warmup_steps": options.warmup,
        "batch": BATCH,
        "fastest": fastest,
        "ratio": spread(ratios),
        "runs": runs,
    }
    console.print(_table(result))
    console.print(f"{min(ratios):.2f} - {max(ratios):.2f} x {fastest}; what differs is in {Path(__file__).name}")
    write_json(options.out, result)
    console.print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a causal language model (default: the lab's policy)")
    parser.add_argument("--data", help="examples, as data.source of a fine-tuning (default: the lab's answers)")
    parser.add_argument("--template", help="data.template (default: none for the lab, a plain one otherwise)")
    parser.add_argument("--steps", type=int, default=46, help="measured steps a run (46)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that are left out (2)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn (2)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each (2)")
    parser.add_argument("--trl", nargs="*", choices=TRL_OPTIONS, default=list(TRL_OPTIONS), help="options of TRL")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of our configuration")
    parser.add_argument("--same-allocator", action="store_true", help="give TRL our glibc allocator settings")
    parser.add_argument("--quick", action="store_true", help="6 measured steps, 1 round: does it work?")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/sft_vs_trl.json"), help="the JSON file")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.warmup, options.rounds = 6, 2, 1
    if (options.steps + options.warmup) % WINDOW:
        parser.error(f"--steps and --warmup together must be a multiple of {WINDOW}, so that each example is used once")
    return options


def _config(options: argparse.Namespace) -> Any:
    """Our run's configuration, as a user would write it: one pass over as many examples as the steps take."""
    from detox_ray.config_file import parse_section
    from detox_ray.data.lab import lab_path
    from detox_ray.sft_config import SFTConfig

    steps = options.warmup + options.steps
    data = {"source": str(Path(options.data).resolve()) if options.data else str(lab_path("answers"))}
    template = options.template or ("Human: {prompt}\nAssistant: " if options.data else "none")
    return parse_section(
        SFTConfig,
        {
            "name": "benchmark",
            "data": data | {"template": template, "dev_examples": 8, "max_tokens": 384, "limit": steps * BATCH},
            "policy": {
                "model": str(Path(options.model).resolve()) if options.model else str(lab_path("policy")),
                "quantization": "none",
                "lora": {"rank": LORA_RANK, "alpha": 2 * LORA_RANK},
            },
            "train": {
                "total_steps": steps,
                "batch_size": BATCH,
                "microbatch_tokens": MICROBATCH_TOKENS,
                "learning_rate": LEARNING_RATE,
                "evaluate_every": steps,
                "threads": options.threads,
            },
        },
    )


def _prepare(config: Any) -> dict[str, Any]:
    """TRL's run, on the examples that our run will read."""
    from detox_ray.data.example_split import load_examples
    from detox_ray.policy.load import end_token_ids, load_tokenizer

    tokenizer = load_tokenizer(config.policy)
    examples = load_examples(config.data, tokenizer, end_token_ids(config.policy, tokenizer), config.seed).train
    if len(examples) < config.train.total_steps * BATCH:
        raise SystemExit(f"{len(examples)} examples are too few for {config.train.total_steps} steps of {BATCH}")
    return {
        "model": config.policy.model,
        "examples": [
            {
                "input_ids": [*map(int, e.prompt_ids), *map(int, e.response_ids)],
                "labels": [-100] * len(e.prompt_ids) + [*map(int, e.response_ids)],
            }
            for e in examples
        ],
        "pad_id": tokenizer.pad_token_id,
        "batch": BATCH,
        "steps": config.train.total_steps,
        "learning_rate": LEARNING_RATE,
        "lora_rank": LORA_RANK,
        "threads": config.train.threads,
    }


def _run_ours(config: Any, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`detox-ray sft` in a process of its own; times from its metrics file."""
    import numpy as np

    from detox_ray.metrics_file import read_metrics
    from detox_ray.policy.adapter import load_adapter

    tree = config.model_dump(mode="json") | {"output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    program = Path(sys.executable).with_name("detox-ray")
    call([str(program), "sft", str(folder / "config.yaml"), *options.set], folder / "log", {})
    lines = read_metrics(folder / "benchmark" / "metrics.jsonl")
    tensors = load_adapter(folder / "benchmark" / "adapter").tensors
    # A fresh adapter's B is zero, so what is not zero has been trained; its A has moved with it.
    trained = {name: bool(np.any(tensor)) for name, tensor in tensors.items() if ".lora_B." in name}
    return {
        "step_s": [line["time_learn_s"] for line in lines],
        "tokens": [line["tokens"] for line in lines],
        "loss": [line["loss"] for line in lines],
        "adapter_tensors": len(trained),
        "adapter_tensors_changed": sum(trained.values()),
    }


def _run_trl(python: Path, task: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """SFTTrainer in a process of its own environment."""
    task = task | {"output_dir": str(folder / "output"), "result": str(folder / "result.json")}
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    if options.same_allocator:
        from detox_ray.trainer import LEARNER_ENVIRONMENT

        environment |= LEARNER_ENVIRONMENT
    script = Path(__file__).with_name("trl_sft.py")
    call([str(python), str(script), str(folder / "task.json")], folder / "log", environment)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def _summary(name: str, result: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Tokens a second over the measured steps of one run."""
    if result["adapter_tensors_changed"] != result["adapter_tensors"]:
        raise SystemExit(f"{name} did not train every LoRA tensor; the comparison means nothing")
    steps, tokens = result["step_s"][warmup:], result["tokens"][warmup:]
    return result | {"tokens_per_s": sum(tokens) / sum(steps), "measured_step_s": spread(steps)}


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['model']}: fine-tuning on {BATCH} examples a step, {result['threads']} threads, "
        f"{result['measured_steps']} steps a run"
    )
    table.add_column("system", no_wrap=True)
    for column in ("real tokens/s", "step s, median", "min - max", "tokens a run", "last loss"):
        table.add_column(column, justify="right")
    for name, runs in result["runs"].items():
        for run in runs:
            step = run["measured_step_s"]
            table.add_row(
                name,
                f"{run['tokens_per_s']:,.0f}",
                f"{step['median']:.2f}",
                f"{step['min']:.2f} - {step['max']:.2f}",
                f"{sum(run['tokens']):,}",
                f"{run['loss'][-1]:.2f}",
            )
    return table


if __name__ == "__main__":
    main()
