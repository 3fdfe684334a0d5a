"""What of Perspective's answers is kept, for whom and how long."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from perspective_server import KNOWN, PerspectiveServer, load, score

from detox_ray.rewards.deadline import answer_within

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("environment")]

RUDE, CIVIL = "you fool", "thank you, friend"
TEXTS = [RUDE, CIVIL, "what a fine day"]
ROOT = Path(__file__).parents[2]


SCORE = """
import sys
from detox_ray.classifier_config import ClassifierConfig
from detox_ray.rewards import perspective
perspective.MAX_THREADS = int(sys.argv[2])
settings = {"address": sys.argv[1], "requests_per_second": 200}
config = ClassifierConfig(name="api", kind="perspective", perspective=settings)
print(perspective.PerspectiveClassifier(config).toxicity(sys.argv[3:]).sum(), flush=True)
"""


def start(server: PerspectiveServer, threads: int, texts: list[str]) -> subprocess.Popen[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", SCORE, server.address, str(threads), *texts],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> float:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return float(output)


def test_a_killed_process_is_continued(server: PerspectiveServer) -> None:
    texts = [f"day number {i}" for i in range(8)]
    server.holds = texts[4]
    killed = start(server, 1, texts)
    assert server.holding.wait(120)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert set(server.received) == set(texts[:5])
    server.holds = None
    assert finished(start(server, 1, texts)) == pytest.approx(0.8, abs=1e-5)
    assert server.received == dict.fromkeys(texts, 1) | {texts[4]: 2}, "only what was never answered is asked again"


def test_two_processes_share_the_cache(server: PerspectiveServer) -> None:
    texts = [f"day number {i}" for i in range(40)]
    server.delay_s = 0.05
    both = [start(server, 4, texts), start(server, 4, texts[::-1])]
    assert [finished(process) for process in both] == pytest.approx([4.0, 4.0], abs=1e-4)
    assert server.received == dict.fromkeys(texts, 1)
    server.stop()
    assert finished(start(server, 4, texts)) == pytest.approx(4.0, abs=1e-4), "nothing is asked any more"


def test_the_cache_is_about_what_was_asked(server: PerspectiveServer, tmp_path: Path) -> None:
    load(server).toxicity([RUDE])
    load(server, {"attributes": KNOWN[::-1]}).toxicity([RUDE])
    assert server.received[RUDE] == 1
    load(server, {"attributes": ["TOXICITY"]}).toxicity([RUDE])
    load(server, {"languages": ["en"]}).toxicity([RUDE])
    load(server, {"cache": None}).toxicity([RUDE])
    load(server, {"cache": str(tmp_path / "other.sqlite")}).toxicity([RUDE])
    assert server.received[RUDE] == 5
    file = tmp_path / "cache" / "perspective.sqlite"
    assert file.is_file()
    assert RUDE.encode() not in file.read_bytes()
    in_memory = load(server, {"cache": None})
    in_memory.toxicity([RUDE])
    in_memory.toxicity([RUDE])
    assert server.received[RUDE] == 6


def test_a_revision_has_answers_of_its_own(server: PerspectiveServer) -> None:
    for revision in (None, "1", "2", None, "1"):
        load(server, revision=revision).toxicity([RUDE])
    assert server.received[RUDE] == 3


def test_of_the_answers_in_memory_the_last_ones_are_kept(
    server: PerspectiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detox_ray.rewards.answer_cache.ANSWERS_IN_MEMORY", 2)
    in_memory = load(server, {"cache": None})
    for text in (*TEXTS, *TEXTS[::-1]):
        in_memory.toxicity([text])
    assert [server.received[text] for text in TEXTS] == [2, 1, 1]


def test_past_the_deadline_nobody_waits_for_an_answer(server: PerspectiveServer) -> None:
    classifier = load(server)
    server.holds = RUDE
    start = time.monotonic()
    with answer_within(0.5), pytest.raises(TimeoutError, match="'api' was not done in the time it was given"):
        classifier.toxicity([CIVIL, RUDE])
    server.holds = None
    with answer_within(5):
        assert classifier.toxicity([CIVIL]) == pytest.approx([score(CIVIL, "TOXICITY")])
    assert time.monotonic() - start < 5
    assert server.received[CIVIL] == 1, "what was answered in time is kept"
