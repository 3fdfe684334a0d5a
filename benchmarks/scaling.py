"""How far one coordinator carries: the real stream, pool and push with up to 256 simulated workers.

    python benchmarks/scaling.py [--workers N ...] [--adapter-mb N ...] [--steps N] [--quick]

What is real: `RolloutStream`, `WorkerPool`, `RolloutScorer` and Ray itself: every request, answer, prompt, rollout,
score and adapter travels as it does in a run. What is simulated: engines, classifiers and learner, which only wait for
the time they are given. Work per worker is fixed, so that in the ideal case a step takes as long with 256 workers as
with one, and each worker makes as many rollouts a second.

    efficiency      the ideal time of a step (what is simulated, one after the other) over its time
    fan-out         time of a push beyond what one worker takes to apply it: digest, object store, N calls and answers
    CPU             of the coordinator's process (in a run: the first learner), seconds per 1,000 rollouts

The workers' processes share this machine's cores with the coordinator, which they do not on a cluster: efficiency is
a lower bound, the coordinator's CPU time is not affected.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
from machine import describe, machine, write_json
from rich import box
from rich.console import Console
from rich.table import Table
from scaling_workers import (
    VOCABULARY,
    SimulatedAdapter,
    SimulatedClient,
    SimulatedWorker,
    Times,
    start_hosts,
    wait,
)

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import RolloutConfig, ShapingConfig
from detox_ray.policy.adapter import Adapter, content_digest
from detox_ray.records import Canary, Prompt
from detox_ray.rollout.pool import WorkerPool
from detox_ray.rollout.stream import RolloutStream
from detox_ray.schedule import Schedule
from detox_ray.serving.reward_client import RewardClient
from detox_ray.serving.rollout_scorer import RolloutScorer

PACKAGES = ("ray", "numpy", "torch")
PROMPTS_A_WORKER = 64  # a step, one response to each
NEW_TOKENS = 64
TIMES = Times(generate_s=4.0, apply_s=0.2, score_s=0.2)
LEARN_S = 2.0
CANARY_PREFIXES = 4
LORA_TENSOR = 2**20  # bytes
OBJECT_STORE_BYTES = 2 * 2**30


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = _options()
    console = Console()
    facts = machine(PACKAGES)
    console.print(describe(facts))
    ray.init(
        address="local", num_cpus=4, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
        log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )  # fmt: skip
    hosts = start_hosts(options.processes, TIMES)
    rows = []
    for workers in options.workers:
        for megabytes in options.adapter_mb:
            rows.append(_measure(hosts, workers, megabytes, options.steps))
            console.print(_line(rows[-1]))
    ray.shutdown()
    console.print(_table(rows))
    settings = {"times": vars(TIMES), "learn_s": LEARN_S, "prompts_a_worker": PROMPTS_A_WORKER, "tokens": NEW_TOKENS}
    write_json(options.out, {"settings": settings | {"steps": options.steps}, "rows": rows, "machine": facts})
    console.print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="(1 4 16 64 256)")
    parser.add_argument("--adapter-mb", type=int, nargs="+", default=[10, 100], help="size of the adapter (10 100)")
    parser.add_argument("--steps", type=int, default=4, help="measured, after one to warm up (4)")
    parser.add_argument("--processes", type=int, default=4, help="that the simulated workers share (4)")
    parser.add_argument("--quick", action="store_true", help="1 and 16 workers, 10 MB, 1 step: does it work?")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/scaling.json"), help="the JSON file")
    options = parser.parse_args()
    if options.quick:
        options.workers, options.adapter_mb, options.steps = [1, 16], [10], 1
    return options


def _measure(hosts: list[Any], workers: int, megabytes: int, steps: int) -> dict[str, Any]:
    """Steps of sampling, scoring, learning and pushing, strictly one after the other."""
    stream = _stream(hosts, workers)
    make_adapter, canary = _adapters(megabytes), _canary()
    stream.connect()
    stream.pool.publish(make_adapter, canary)
    _step(stream, make_adapter, canary, 0)
    measured = [_step(stream, make_adapter, canary, step) for step in range(1, steps + 1)]
    medians = {name: float(np.median([m[name] for m in measured])) for name in measured[0]}
    rollouts = workers * PROMPTS_A_WORKER
    ideal_s = TIMES.generate_s + TIMES.score_s + LEARN_S + TIMES.apply_s
    return {
        "workers": workers,
        "adapter_mb": megabytes,
        "rollouts_a_step": rollouts,
        "efficiency": ideal_s / medians["step_s"],
        "fan_out_s": medians["push_s"] - TIMES.apply_s,
        "batch_overhead_s": medians["batch_s"] - TIMES.generate_s - TIMES.score_s,
        "batch_cpu_s_per_1000": medians["batch_cpu_s"] / rollouts * 1000,
        "push_cpu_s": medians["push_cpu_s"],
        "cpu_s_per_1000": (medians["batch_cpu_s"] + medians["push_cpu_s"]) / rollouts * 1000,
        **medians,
    }


def _step(stream: RolloutStream, make_adapter: Callable[[int], Adapter], canary: Canary, step: int) -> dict[str, float]:
    started, cpu_before = time.perf_counter(), time.process_time()
    stream.next_batch(step, last_step=step)
    batch_s, batch_cpu_s = time.perf_counter() - started, time.process_time() - cpu_before
    wait(LEARN_S)
    before, cpu_before = time.perf_counter(), time.process_time()
    stream.pool.publish(make_adapter, canary)
    ended = time.perf_counter()
    return {
        "batch_s": batch_s,
        "batch_cpu_s": batch_cpu_s,
        "push_s": ended - before,
        "push_cpu_s": time.process_time() - cpu_before,
        "step_s": ended - started,
    }


def _stream(hosts: list[Any], workers: int) -> RolloutStream:
    *rollout_hosts, scoring_host = hosts
    config = RolloutConfig(workers=workers, max_new_tokens=NEW_TOKENS)
    simulated = [SimulatedWorker(rollout_hosts[i % len(rollout_hosts)], i) for i in range(workers)]
    prompts = [
        Prompt(f"{i:064x}", f"prompt number {i} is about as long as they are", tuple(range(12))) for i in range(4096)
    ]
    judge = ClassifierConfig(name="judge", kind="transformers", model="none", label="none")  # not linear: not asked
    client = cast(RewardClient, SimulatedClient(scoring_host))
    return RolloutStream(
        pool=WorkerPool(simulated, config, canary_tolerance=1e-3),
        prompts_for_step=Schedule(prompts, workers * PROMPTS_A_WORKER, 0),
        scorer=RolloutScorer(client, ShapingConfig(min_tokens=8, short_penalty=1.0), [0], judge),
        config=config,
        seed=0,
    )


def _adapters(megabytes: int) -> Callable[[int], Adapter]:
    """Adapters of that size, each other than the one before, with the digest that a real one gets."""
    tensors = {f"layer.{i}": np.zeros(LORA_TENSOR // 4, dtype=np.float32) for i in range(megabytes)}

    def make(version: int) -> Adapter:
        tensors["layer.0"][:] = version
        return cast(Adapter, SimulatedAdapter(version, content_digest({}, tensors), tensors))

    return make


def _canary() -> Canary:
    """The uniform distribution, which simulated workers answer with."""
    logprobs = np.full((CANARY_PREFIXES, VOCABULARY), -np.log(VOCABULARY), dtype=np.float32)
    return Canary([[1, 2, 3]] * CANARY_PREFIXES, logprobs)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['workers']} workers, {row['adapter_mb']} MB: step {row['step_s']:.2f} s, efficiency "
        f"{row['efficiency']:.0%}, fan-out {row['fan_out_s']:.3f} s, "
        f"{row['cpu_s_per_1000']:.2f} CPU s per 1,000 rollouts"
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    titles = (
        "workers", "rollouts a step", "adapter MB", "efficiency", "batch overhead s", "fan-out s", "push CPU s",
        "CPU s per 1,000",
    )  # fmt: skip
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            f"{row['workers']}", f"{row['rollouts_a_step']:,}", f"{row['adapter_mb']}", f"{row['efficiency']:.0%}",
            f"{row['batch_overhead_s']:.2f}", f"{row['fan_out_s']:.3f}", f"{row['push_cpu_s']:.3f}",
            f"{row['cpu_s_per_1000']:.3f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
