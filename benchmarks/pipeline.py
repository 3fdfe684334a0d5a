"""The peer of the scoring benchmarks: a `transformers` text-classification pipeline, warm, in a process of its own."""

import json
import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

BATCH_SIZE = 32
START_TIMEOUT_S = 300.0
ROUND_TIMEOUT_S = 1800.0


class Pipeline:
    """A context in which the pipeline is ready to classify `texts` again and again."""

    def __init__(self, model: str, texts: list[str], label: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_answer, args=(model, texts, label, there), daemon=True)
        self._process.start()
        there.close()

    def __enter__(self) -> "Pipeline":
        receive(self._connection, START_TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()

    def classify(self) -> tuple[float, np.ndarray]:
        """(wall seconds, P(label) of every text)."""
        self._connection.send("again")
        return receive(self._connection, ROUND_TIMEOUT_S)


def receive(connection: Connection, timeout_s: float) -> Any:
    """What the process at the other end sends; ends the benchmark when nothing comes."""
    if not connection.poll(timeout_s):
        raise SystemExit(f"the other process did not answer within {timeout_s:.0f} s")
    try:
        return connection.recv()
    except EOFError:
        raise SystemExit("the other process failed") from None


def real_texts(data: str | None, number: int) -> list[str]:
    """Sentences of a RealToxicityPrompts file (none: the lab's prompts), in a fixed random order, again if need be."""
    from detox_ray.data.lab import lab_path

    path = Path(data) if data else lab_path("prompts")
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    texts = [
        record["prompt"]["text"] + record["continuation"]["text"] if data else record["prompt"] for record in records
    ]
    random.Random(0).shuffle(texts)
    return (texts * (number // len(texts) + 1))[:number]


def _answer(model: str, texts: list[str], label: str, connection: Connection) -> None:
    """Answer each request with (wall seconds, P(label) of every text) until told to stop."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    classify: Any = pipeline("text-classification", model=model, device="cpu")

    def scores(number: int) -> np.ndarray:
        generator = (text for text in texts[:number])
        answers = classify(generator, batch_size=BATCH_SIZE, truncation=True, max_length=256)
        # Of two labels the pipeline returns the likelier one.
        return np.array([a["score"] if a["label"] == label else 1 - a["score"] for a in answers])

    scores(BATCH_SIZE)
    connection.send("ready")
    while connection.recv() is not None:
        started = time.perf_counter()
        values = scores(len(texts))
        connection.send((time.perf_counter() - started, values))
