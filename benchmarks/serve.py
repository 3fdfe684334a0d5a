"""The scoring service over HTTP against a `transformers` pipeline of the same model, in one run.

    python benchmarks/serve.py
    python benchmarks/serve.py --model path/to/classifier --label toxic --data realtoxicityprompts.jsonl
    python benchmarks/serve.py --memory

The service is `detox-ray serve` as a user starts it, with one replica of the classifier a core and without its cache;
the clients (aiohttp, keep-alive) run on the same cores. In every round the pipeline (batches of 32, all cores) and the
service answer the same texts: in lists, and one by one by many clients at once. Reported are medians over the rounds of
texts a second and of the ratio to the pipeline of the same round, the latencies of all single requests by number of
clients, and the largest difference between the two systems' scores: a fast wrong answer is no answer.

`--memory` asks 100,000 times with the cheap linear classifier and the cache on, and samples the private memory (USS) of
the service's processes.
"""

import argparse
import asyncio
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import yaml
from machine import describe, machine, spread, write_json
from pipeline import Pipeline, real_texts
from rich import box
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "transformers", "ray", "fastapi", "uvicorn", "aiohttp")
PIPELINE = "pipeline"
LIST_TEXTS = 256
LISTS_AT_ONCE = 4
CLIENTS = (1, 8, 32, 128)
START_TIMEOUT_S = 300.0
MEMORY_REQUESTS = 100_000
MEMORY_SAMPLES = 10
MEMORY_CLIENTS = 32
WORDS = ("you", "are", "a", "fool", "friend", "thank", "the", "kind", "idea", "nice", "day", "of", "what", "and", "to")
# What Ray calls the service's processes, and what they are here.
PROCESSES = {
    "ray::ProxyActor": "proxy",
    "ray::ServeReplica:toxicity-api:toxicity-api": "HTTP replica",
    "ray::ServeReplica:toxicity-api:ensemble": "ensemble",
    "ray::ServeReplica:toxicity-api:classifier": "classifier",
    "ray::ServeController": "controller",
}


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = _options()
    console = Console()
    facts = machine(PACKAGES)
    console.print(describe(facts))
    if options.memory:
        result = _measure_memory(options, console)
        console.print(_memory_table(result))
    else:
        result = _measure_speed(options, console)
        console.print(_speed_table(result))
        console.print(_latency_table(result))
    write_json(options.out, result | {"machine": facts})
    console.print(f"written to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a sequence classifier (default: the lab's)")
    parser.add_argument("--label", help="its label that means toxic (default: rude, of the lab's)")
    parser.add_argument("--data", help="RealToxicityPrompts file: prompt and continuation (default: the lab's prompts)")
    parser.add_argument("--texts", type=int, default=4096, help="texts a round of lists (4096)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of single requests by each number of clients (15)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each asks every system once (5)")
    parser.add_argument("--replicas", type=int, default=psutil.cpu_count() or 1, help="of the classifier (one a core)")
    parser.add_argument("--memory", action="store_true", help="measure memory over 100,000 requests instead")
    parser.add_argument("--requests", type=int, default=MEMORY_REQUESTS, help="with --memory (100,000)")
    parser.add_argument("--quick", action="store_true", help="512 texts, 3 s, 1 round; 2,000 requests: does it work?")
    parser.add_argument("--out", type=Path, help="the JSON file (runs/benchmarks/serve.json or serve_memory.json)")
    options = parser.parse_args()
    if options.quick:
        options.texts, options.seconds, options.rounds, options.requests = 512, 3.0, 1, 2000
    options.out = options.out or Path(f"runs/benchmarks/serve{'_memory' if options.memory else ''}.json")
    return options


def _measure_speed(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from detox_ray.data.lab import lab_path

    model, label = options.model or str(lab_path("classifier")), options.label or "rude"
    texts = real_texts(options.data, options.texts)
    classifier = {
        "name": "classifier",
        "kind": "transformers",
        "model": str(Path(model).resolve()),
        "label": label,
        "output": "probability",
        "calibration": "none",
        "replicas": options.replicas,
    }
    speeds: dict[str, list[float]] = {name: [] for name in (PIPELINE, "lists", *map(_singles, CLIENTS))}
    latencies: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    difference = 0.0
    console.print("starting the pipeline and the service")
    with (
        Pipeline(model, texts, label) as pipeline,
        _service({"reward": {"classifiers": [classifier]}, "cache_texts": 0}) as (address, _),
    ):
        asyncio.run(_ask_lists(address, texts[:512]))
        for number in range(1, options.rounds + 1):
            wall_s, theirs = pipeline.classify()
            speeds[PIPELINE].append(len(texts) / wall_s)
            wall_s, ours = asyncio.run(_ask_lists(address, texts))
            speeds["lists"].append(len(texts) / wall_s)
            difference = max(difference, float(np.abs(ours - theirs).max()))
            for clients in CLIENTS:
                wall_s, seconds = asyncio.run(_ask_singles(address, texts, clients, options.seconds))
                speeds[_singles(clients)].append(len(seconds) / wall_s)
                latencies[clients] += seconds
            latest = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in speeds.items())
            console.print(f"round {number} of {options.rounds}: {latest} texts/s")
    return {
        "model": Path(model).name,
        "texts": len(texts),
        "replicas": options.replicas,
        "texts_per_s": {name: spread(values) for name, values in speeds.items()},
        "ratio_to_pipeline": {
            name: spread([own / base for own, base in zip(values, speeds[PIPELINE], strict=True)])
            for name, values in speeds.items()
        },
        "latency_ms": {
            str(clients): {
                "requests": len(seconds),
                **{f"p{q}": round(1000 * float(np.percentile(seconds, q)), 1) for q in (50, 90, 99)},
            }
            for clients, seconds in latencies.items()
        },
        "largest_difference": difference,
    }


def _singles(clients: int) -> str:
    return f"single texts, {clients} client{'s' if clients > 1 else ''}"


@contextmanager
def _service(tree: dict[str, Any]) -> Iterator[tuple[str, psutil.Process]]:
    """`detox-ray serve` of a configuration; yields its address, once it is ready, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="detox_ray-benchmark-") as scratch:
        file = Path(scratch) / "service.yaml"
        file.write_text(yaml.safe_dump(tree | {"http": {"port": port}}), encoding="utf-8")
        command = [str(Path(sys.executable).parent / "detox-ray"), "serve", str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as service:
            try:
                if service.stdout is None or not service.stdout.readline():
                    raise SystemExit("the service did not start")
                yield f"http://127.0.0.1:{port}", psutil.Process(service.pid)
            finally:
                service.send_signal(signal.SIGINT)
                try:
                    service.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(service.pid, signal.SIGKILL)


async def _ask_lists(address: str, texts: list[str]) -> tuple[float, np.ndarray]:
    """(wall seconds, toxicity of every text): `LISTS_AT_ONCE` requests of `LIST_TEXTS` texts are always under way."""
    toxicity = np.zeros(len(texts))
    starts = iter(range(0, len(texts), LIST_TEXTS))
    async with aiohttp.ClientSession(address) as session:

        async def ask() -> None:
            for start in starts:
                part = texts[start : start + LIST_TEXTS]
                results = (await _post(session, {"texts": part, "toxicity": True}))["results"]
                toxicity[start : start + len(part)] = [result["toxicity"]["classifier"] for result in results]

        started = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(LISTS_AT_ONCE)))
        return time.perf_counter() - started, toxicity


async def _ask_singles(
    address: str, texts: list[str], clients: int, seconds: float | None = None
) -> tuple[float, list[float]]:
    """(wall seconds, seconds of each request) of clients that each ask again as soon as they have their answer.

    With `seconds` they go round the texts until then; without, each text is asked once.
    """
    latencies: list[float] = []
    queue = iter(texts) if seconds is None else itertools.cycle(texts)
    async with aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=clients)) as session:
        started = time.perf_counter()

        async def ask() -> None:
            for text in queue:
                asked = time.perf_counter()
                if seconds is not None and asked - started > seconds:
                    return
                await _post(session, {"text": text})
                latencies.append(time.perf_counter() - asked)

        await asyncio.gather(*(ask() for _ in range(clients)))
        return time.perf_counter() - started, latencies


async def _post(session: aiohttp.ClientSession, body: dict[str, Any]) -> Any:
    async with session.post("/v1/score", json=body) as response:
        if response.status != 200:
            raise SystemExit(f"the service answered {response.status}: {(await response.text())[:200]}")
        return await response.json()


def _measure_memory(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Private MiB of each kind of process after every tenth of the requests."""
    words = {
        "name": "words",
        "kind": "linear",
        "model": "profanity_check:predict_prob",
        "output": "probability",
        "calibration": "none",
    }
    generator = random.Random(0)
    part = options.requests // MEMORY_SAMPLES
    samples: list[dict[str, float]] = []
    with _service({"reward": {"classifiers": [words]}}) as (address, process):
        asyncio.run(_ask_singles(address, ["warm"], 1))
        samples.append({"requests": 0, **_private_mib(process)})
        for number in range(1, MEMORY_SAMPLES + 1):
            texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 30))) for _ in range(part)]
            wall_s, _ = asyncio.run(_ask_singles(address, texts, MEMORY_CLIENTS))
            samples.append({"requests": number * part, "requests_per_s": part / wall_s, **_private_mib(process)})
            shown = ", ".join(f"{name} {value:,.0f}" for name, value in samples[-1].items())
            console.print(shown)
    return {"clients": MEMORY_CLIENTS, "samples": samples}


def _private_mib(service: psutil.Process) -> dict[str, float]:
    """USS by kind of process, MiB, of the service and what Ray runs for it."""
    total = dict.fromkeys(PROCESSES.values(), 0.0)
    for child in service.children(recursive=True):
        title = " ".join(child.cmdline())
        for start, name in PROCESSES.items():
            if title.startswith(start):
                total[name] += child.memory_full_info().uss / 2**20
    return total


def _speed_table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['model']}, {result['replicas']} replicas, {result['texts']:,} texts; "
        f"scores differ by at most {result['largest_difference']:.1e}"
    )
    table.add_column("system", no_wrap=True)
    for column in ("texts/s", "min - max", "x pipeline", "min - max"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, speed in result["texts_per_s"].items():
        ratio = result["ratio_to_pipeline"][name]
        table.add_row(
            name,
            f"{speed['median']:,.0f}",
            f"{speed['min']:,.0f} - {speed['max']:,.0f}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f} - {ratio['max']:.2f}",
        )
    return table


def _latency_table(result: dict[str, Any]) -> Table:
    table = Table(title="latency of single texts, ms")
    for column in ("clients", "requests", "p50", "p90", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    for clients, values in result["latency_ms"].items():
        table.add_row(clients, f"{values['requests']:,}", *(f"{values[key]:,.1f}" for key in ("p50", "p90", "p99")))
    return table


def _memory_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"private memory, MiB, {result['clients']} clients", box=box.SIMPLE_HEAD, pad_edge=False)
    names = [name for name in result["samples"][0] if name != "requests"]
    for column in ("requests", *names, "requests/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for sample in result["samples"]:
        speed = sample.get("requests_per_s")
        table.add_row(
            f"{sample['requests']:,.0f}",
            *(f"{sample[name]:,.1f}" for name in names),
            "" if speed is None else f"{speed:,.0f}",
        )
    return table


if __name__ == "__main__":
    main()
