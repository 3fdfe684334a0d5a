"""Whether a sample costs the same with 1,000 prompts as with 100,000: CPU time of all that touches every prompt.

    python benchmarks/prompt_count.py [--counts 1000 10000 100000]

Once a run: reading, filtering, tokenising and splitting (`load_prompts`), and sending the prompts to the learner (the
pickled schedule). Once a step: the schedule's 64 prompts. Prompts are made of the lab's words; each count is measured
in turn, best of three.
"""

import argparse
import json
import pickle
import random
import tempfile
import time
from pathlib import Path

from machine import describe, machine, write_json
from rich.console import Console
from rich.table import Table

from detox_ray.config import DataConfig, PolicyConfig
from detox_ray.data.lab import lab_path
from detox_ray.data.prompts import load_prompts
from detox_ray.policy.load import load_tokenizer
from detox_ray.schedule import Schedule

PER_STEP, STEPS, HELDOUT, ATTEMPTS = 64, 200, 200, 3


def main() -> None:
    """Measure every count, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/prompt_count.json"), help="the JSON file")
    options = parser.parse_args()
    console = Console()
    facts = machine(("transformers", "numpy"))
    console.print(describe(facts))
    rows = [min((measure(count) for _ in range(ATTEMPTS)), key=sum) for count in options.counts]
    table = Table("prompts", "read, us a prompt", "send, us a prompt", "schedule, us a sample")
    for count, row in zip(options.counts, rows, strict=True):
        table.add_row(f"{count:,}", *(f"{value:.1f}" for value in row))
    console.print(table)
    write_json(options.out, {"machine": facts, "counts": options.counts, "microseconds": rows})


def measure(count: int) -> tuple[float, float, float]:
    """CPU microseconds: a prompt read, a prompt sent, a sample scheduled."""
    words = sorted({word for line in lab_path("prompts").open() for word in json.loads(line)["prompt"].split()})
    rng = random.Random(count)
    tokenizer = load_tokenizer(PolicyConfig(model=str(lab_path("policy"))))
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for number in range(count + HELDOUT):
            file.write(json.dumps({"prompt": f"{number} {' '.join(rng.choices(words, k=12))}"}) + "\n")
        file.flush()
        config = DataConfig(source=file.name, max_tokens=48, heldout_prompts=HELDOUT)
        started = time.process_time()
        prompts = load_prompts(config, tokenizer, seed=0).train
        read = time.process_time() - started
    if len(prompts) != count:
        raise SystemExit(f"{len(prompts)} of {count} prompts were read")
    schedule = Schedule(prompts, PER_STEP, seed=0)
    started = time.process_time()
    schedule = pickle.loads(pickle.dumps(schedule))
    sent = time.process_time() - started
    schedule(0)
    started = time.process_time()
    for step in range(STEPS):
        schedule(step)
    scheduled = time.process_time() - started
    return read / count * 1e6, sent / count * 1e6, scheduled / (STEPS * PER_STEP) * 1e6


if __name__ == "__main__":
    main()
