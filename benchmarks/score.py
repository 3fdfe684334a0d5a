"""Texts a second of `score_file` against a plain `transformers` pipeline, side by side; its memory from 10k to 1M rows.

    python benchmarks/score.py [--model FOLDER --label NAME] [--data FILE] [--texts N] [--rounds N] [--quick]
    python benchmarks/score.py --memory

    pipeline        as its documentation shows for a data set: text-classification over a generator, batch_size=32, the
                    threads torch takes by default, warmed up once
    score_file, n   detox-ray score on n Ray Data workers, default settings; every round starts Ray, loads the model
                    and stops Ray again, so that nothing of it runs beside the pipeline

Texts and model are the same, rounds in turn. `texts/s` is of the scoring alone: for both without the time to start and
to load the model. `whole call` is the median of everything `score_file` does, Ray's start and its stop included.
The largest difference between the two systems' scores is printed too: a fast wrong answer is no answer.

`--memory` scores generated rows with the cheap linear classifier and samples the driver, the reader and the workers:
private memory (USS; the object store, which they share, has a fixed size), its peak over a run.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from machine import describe, machine, spread, write_json
from pipeline import START_TIMEOUT_S, Pipeline, real_texts, receive
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "transformers", "ray", "pyarrow")
PIPELINE = "pipeline"
MEMORY_ROWS = (10_000, 100_000, 1_000_000)
SAMPLE_S = 0.2
WORDS = ("you", "are", "a", "fool", "friend", "thank", "the", "kind", "idea", "nice", "day", "of", "what", "and", "to")
# Titles Ray gives the processes of a scoring, and what they are here.
PROCESSES = {"ray::MapWorker": "worker", "ray::MapBatches": "reader"}


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = _options()
    console = Console()
    facts = machine(PACKAGES)
    console.print(describe(facts))
    with tempfile.TemporaryDirectory(prefix="detox_ray-benchmark-") as scratch:
        if options.memory:
            result = _measure_memory(options, Path(scratch), console)
            console.print(_memory_table(result))
        else:
            result = _measure_speed(options, Path(scratch), console)
            console.print(_speed_table(result))
    write_json(options.out, result | {"machine": facts})
    console.print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a sequence classifier (default: the lab's)")
    parser.add_argument("--label", help="its label that means toxic (default: rude, of the lab's)")
    parser.add_argument("--data", help="RealToxicityPrompts file: prompt and continuation (default: the lab's prompts)")
    parser.add_argument("--texts", type=int, default=8000, help="texts a round (8000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each asks every system once (5)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, psutil.cpu_count() or 1], help="of score_file")
    parser.add_argument("--memory", action="store_true", help="measure memory from 10k to 1M rows instead")
    parser.add_argument("--quick", action="store_true", help="1,200 texts, 1 round; 1k and 10k rows: does it work?")
    parser.add_argument("--out", type=Path, help="the JSON file (runs/benchmarks/score.json or score_memory.json)")
    options = parser.parse_args()
    if options.quick:
        options.texts, options.rounds = 1200, 1
    options.out = options.out or Path(f"runs/benchmarks/score{'_memory' if options.memory else ''}.json")
    return options


def _measure_speed(options: argparse.Namespace, scratch: Path, console: Console) -> dict[str, Any]:
    from detox_ray.data.lab import lab_path

    model, label = options.model or str(lab_path("classifier")), options.label or "rude"
    texts = real_texts(options.data, options.texts)
    file = scratch / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    workers = {f"score_file, {number}": number for number in dict.fromkeys(options.workers)}
    speeds: dict[str, list[float]] = {name: [] for name in (PIPELINE, *workers)}
    calls: dict[str, list[float]] = {name: [] for name in workers}
    difference = 0.0
    console.print("starting the pipeline")
    with Pipeline(model, texts, label) as pipeline:
        for number in range(1, options.rounds + 1):
            # Turning the order round as well keeps a system from always following the same one.
            for name in (PIPELINE, *workers) if number % 2 else (*reversed(workers), PIPELINE):
                if name == PIPELINE:
                    wall_s, theirs = pipeline.classify()
                    speeds[name].append(len(texts) / wall_s)
                else:
                    output = scratch / f"{name}-{number}"
                    call_s, speed = _score(file, output, model, label, workers[name])
                    speeds[name].append(speed)
                    calls[name].append(call_s)
            ours = pq.read_table(output)["toxicity/classifier"].to_numpy()
            difference = max(difference, float(np.abs(ours - theirs).max()))
            latest = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in speeds.items())
            console.print(f"round {number} of {options.rounds}: {latest} texts/s")
    return {
        "model": Path(model).name,
        "texts": len(texts),
        "texts_per_s": {name: spread(values) for name, values in speeds.items()},
        "ratio_to_pipeline": {
            name: spread([own / base for own, base in zip(values, speeds[PIPELINE], strict=True)])
            for name, values in speeds.items()
        },
        "whole_call_s": {name: spread(values) for name, values in calls.items()},
        "largest_difference": difference,
    }


def _classifier(model: str, label: str) -> Any:
    from detox_ray.classifier_config import ClassifierConfig

    return ClassifierConfig(name="classifier", kind="transformers", model=model, label=label)


def _score(file: Path, output: Path, model: str, label: str, workers: int) -> tuple[float, float]:
    """(seconds of the whole call, texts a second of the scoring)."""
    from detox_ray.config import RayConfig
    from detox_ray.scoring.score_file import score_file

    started = time.perf_counter()
    summary = score_file(
        file, output, [_classifier(model, label)], workers=workers, ray=RayConfig(num_cpus=workers), quiet=True
    )
    return time.perf_counter() - started, summary["rows_per_s"]


def _measure_memory(options: argparse.Namespace, scratch: Path, console: Console) -> dict[str, Any]:
    """Peak private MiB of each kind of process, and rows a second, by number of rows."""
    peaks: dict[int, dict[str, float]] = {}
    for rows in (1_000, 10_000) if options.quick else MEMORY_ROWS:
        file = scratch / f"{rows}.jsonl"
        _generate(file, rows)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_score_linear, args=(str(file), str(scratch / f"{rows}"), there))
        process.start()
        there.close()
        peaks[rows] = _peaks(process.pid or 0, here)
        peaks[rows]["rows_per_s"] = receive(here, START_TIMEOUT_S)
        process.join()
        shown = ", ".join(f"{name} {value:,.0f}" for name, value in peaks[rows].items())
        console.print(f"{rows:,} rows: {shown}")
    return {"file_mib": {str(rows): (scratch / f"{rows}.jsonl").stat().st_size / 2**20 for rows in peaks}} | {
        "peak_private_mib": {str(rows): values for rows, values in peaks.items()}
    }


def _generate(file: Path, rows: int) -> None:
    """Made-up texts of 1 to 30 words."""
    generator = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            text = " ".join(generator.choices(WORDS, k=generator.randint(1, 30)))
            out.write(json.dumps({"id": number, "text": text}) + "\n")


def _score_linear(file: str, output: str, connection: Connection) -> None:
    from detox_ray.config import EvaluationConfig
    from detox_ray.scoring.score_file import score_file

    summary = score_file(file, output, [EvaluationConfig().judge], quiet=True)
    connection.send(summary["rows_per_s"])


def _peaks(driver: int, connection: Connection) -> dict[str, float]:
    """Peak private memory in MiB of the driver, the reader and the largest worker, until the driver answers."""
    peaks: dict[str, float] = {"driver": 0.0, "reader": 0.0, "worker": 0.0}
    process = psutil.Process(driver)
    while not connection.poll(SAMPLE_S):
        try:
            family = [("driver", process)]
            for child in process.children(recursive=True):
                title = (child.cmdline() or [""])[0]
                family += [(name, child) for start, name in PROCESSES.items() if title.startswith(start)]
            for name, member in family:
                peaks[name] = max(peaks[name], member.memory_full_info().uss / 2**20)
        except psutil.Error:
            continue
    return peaks


def _speed_table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['model']}, {result['texts']:,} texts; "
        f"scores differ by at most {result['largest_difference']:.1e}"
    )
    table.add_column("system", no_wrap=True)
    for column in ("texts/s", "min - max", "x pipeline", "min - max", "whole call"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, speed in result["texts_per_s"].items():
        ratio, call = result["ratio_to_pipeline"][name], result["whole_call_s"].get(name)
        table.add_row(
            name,
            f"{speed['median']:,.0f}",
            f"{speed['min']:,.0f} - {speed['max']:,.0f}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f} - {ratio['max']:.2f}",
            f"{call['median']:.1f} s" if call else "",
        )
    return table


def _memory_table(result: dict[str, Any]) -> Table:
    table = Table(title="peak private memory, MiB, and speed with the linear classifier")
    for column in ("rows", "file", "driver", "reader", "worker", "rows/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for rows, values in result["peak_private_mib"].items():
        cells = [f"{values[name]:,.0f}" for name in ("driver", "reader", "worker", "rows_per_s")]
        table.add_row(f"{int(rows):,}", f"{result['file_mib'][rows]:,.0f}", *cells)
    return table


if __name__ == "__main__":
    main()
