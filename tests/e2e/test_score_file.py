"""A file scored on the real Ray Data: against the classifiers called directly; killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.data.lab import lab_path
from detox_ray.errors import ConfigError, RewardError
from detox_ray.rewards.classifiers import load_classifier
from detox_ray.scoring.score_file import CHUNK_ROWS, score_file

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("local_ray")]
ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from detox_ray.classifier_config import ClassifierConfig
from detox_ray.scoring.score_file import score_file
if __name__ == "__main__":
    slow = ClassifierConfig(name="slow", kind="linear", model="slow:toxicity")
    score_file(sys.argv[1], sys.argv[2], [slow], workers=2, quiet=True)
"""
LAB = ClassifierConfig(name="lab", kind="transformers", model=str(lab_path("classifier")), label="rude")
LINEAR = ClassifierConfig(name="linear", kind="linear", model="profanity_check:predict_prob")
# Takes 2 ms a text, and writes down which rows it was asked for; the texts are the numbers of the rows.
SLOW = """
import pathlib, time
def toxicity(texts):
    time.sleep(0.002 * len(texts))
    with pathlib.Path(__file__).with_name("asked").open("a") as file:
        file.write("".join(f"{text}\\n" for text in texts))
    return [int(text) % 8 / 8 for text in texts]
"""


@pytest.fixture(scope="module")
def scored(
    local_ray: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], Path, dict[str, Any], str]:
    """The rows of a file with all that can be wrong with one, its folder of scores, the summary, what was printed."""
    words = ["you", "fool", "thank", "friend", "the", "idea", "is", "stupid", "kind"]
    texts: list[str | None] = [" ".join(words[i % 9 :] * (1 + i % 5)) for i in range(1000)]
    texts[3], texts[500], texts[501], texts[999] = None, "", "nice day " * 20_000, "a nul \0 and 🙂"
    rows = [{"id": i, "reply": {"text": text, "by": "somebody"}, "tags": ["x", i]} for i, text in enumerate(texts)]
    folder = tmp_path_factory.mktemp("scored")
    lines = [json.dumps(row).encode() for row in rows]
    lines.insert(700, b'{"id": -1, "reply": {"text": "caf\xe9"}}')
    (folder / "texts.jsonl").write_bytes(b"\n".join(lines))
    with redirect_stdout(StringIO()) as printed, redirect_stderr(printed):
        summary = score_file(folder / "texts.jsonl", folder / "out", [LAB, LINEAR], "reply.text", workers=2, quiet=True)
    return rows, folder / "out", summary, printed.getvalue()


def test_scores_are_those_of_the_classifiers_called_directly(scored: Any) -> None:
    rows, folder, _, _ = scored
    table = pq.read_table(folder)
    assert len(list(folder.glob("part-*.parquet"))) == -(-1000 // CHUNK_ROWS)
    texts = [row["reply"]["text"] for row in rows]
    kept = [i for i, text in enumerate(texts) if text is not None]
    by_scorer = {}
    for config in (LAB, LINEAR):
        direct = load_classifier(config, "cpu").toxicity([texts[i][:100_000] for i in kept])
        column = table[f"toxicity/{config.name}"].to_numpy()
        assert np.flatnonzero(np.isnan(column)).tolist() == [3]
        np.testing.assert_allclose(column[kept], direct, atol=1e-5)
        by_scorer[config.name] = direct
    assert np.ptp(by_scorer["lab"]) > 0.5
    expected = np.abs(by_scorer["lab"] - by_scorer["linear"]) / 2
    np.testing.assert_allclose(table["disagreement"].to_numpy()[kept], expected, atol=1e-5)


def test_all_columns_are_kept_in_order(scored: Any) -> None:
    rows, folder, _, _ = scored
    table = pq.read_table(folder)
    assert table.column_names[:4] == ["id", "reply.text", "reply.by", "tags"]
    assert table["id"].to_pylist() == list(range(1000))
    assert table["reply.text"].to_pylist() == [row["reply"]["text"] for row in rows]
    assert [json.loads(tags) for tags in table["tags"].to_pylist()] == [row["tags"] for row in rows]


def test_the_summary_counts_what_was_wrong(scored: Any) -> None:
    _, folder, summary, printed = scored
    table = pq.read_table(folder)
    assert summary["rows"] == 1000
    assert summary["left_out"] == {"not UTF-8 (first in line 701)": 1, "null text": 1}
    assert summary["noted"] == {
        "empty text, scored": 1,
        "text scored on its first 100,000 characters": 1,
        "text read by lab in several windows": 1,
    }
    for name in ("lab", "linear"):
        column = table[f"toxicity/{name}"].drop_null().to_numpy()
        assert summary["scorers"][name]["scored"] == 999
        assert summary["scorers"][name]["mean_toxicity"] == pytest.approx(column.mean())
        assert summary["scorers"][name]["share_toxic"] == pytest.approx((column >= 0.5).mean())
    assert printed == ""


def test_a_finished_scoring_is_not_repeated_and_another_is_refused(scored: Any) -> None:
    _, folder, summary, _ = scored
    arguments = (folder.parent / "texts.jsonl", folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    again = score_file(*arguments, [LAB, LINEAR], "reply.text")
    assert again == summary | {"rows_per_s": None}
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")} == before
    with pytest.raises(ConfigError, match="is of another scoring: its scorers is"):
        score_file(*arguments, [LINEAR], "reply.text")


def wait_for_parts(output: Path, number: int, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while len(list(output.glob("part-*.parquet"))) < number:
        assert time.monotonic() < deadline, "no parts appeared"
        time.sleep(0.05)


def processes_of(driver: psutil.Process) -> list[psutil.Process]:
    """Of the Ray a driver started, without its two agents, which end by themselves a minute or two later."""
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    titled = [(process, " ".join(process.cmdline())) for process in driver.children(recursive=True)]
    return [p for p, title in titled if title and not title.startswith(agents) and "agent.py" not in title]


def kill_a_worker(output: Path, parts: int) -> None:
    """As soon as so many parts are there."""
    wait_for_parts(output, parts)
    workers = [p for p in processes_of(psutil.Process()) if "PartScorer" in p.cmdline()[0]]
    # Those of a scoring before may still be there.
    max(workers, key=psutil.Process.create_time).send_signal(signal.SIGKILL)


def test_a_killed_scoring_continues_without_a_row_twice_or_missing(modules: Path, tmp_path: Path) -> None:
    rows, texts, output = 24 * CHUNK_ROWS + 17, tmp_path / "texts.csv", tmp_path / "out"
    (modules / "slow.py").write_text(SLOW)
    texts.write_text("row,text\n" + "".join(f"{i},{i}\n" for i in range(rows)))
    log = tmp_path / "first.log"
    with log.open("wb") as file:
        environment = {**os.environ, "PYTHONPATH": f"{modules}:{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-c", SCRIPT, str(texts), str(output)]
        first = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
    wait_for_parts(output, 4)
    assert log.read_text() == ""
    driver = psutil.Process(first.pid)
    started = processes_of(driver)
    driver.send_signal(signal.SIGKILL)
    first.wait()
    _, left = psutil.wait_procs(started, timeout=120)
    assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    finished = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.glob("part-*")}
    assert 4 <= len(finished) < 25
    (modules / "asked").unlink()

    # One of its workers is killed as well, and is started again.
    with ThreadPoolExecutor(1) as killer:
        killed = killer.submit(kill_a_worker, output, len(finished) + 2)
        slow = ClassifierConfig(name="slow", kind="linear", model="slow:toxicity")
        summary = score_file(texts, output, [slow], workers=2)
    killed.result()

    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished} == finished
    table = pq.read_table(output)
    assert table["row"].to_pylist() == [str(i) for i in range(rows)]
    assert table["toxicity/slow"].to_pylist() == [i % 8 / 8 for i in range(rows)]
    done_before = {text for path in finished for text in pq.read_table(path)["text"].to_pylist()}
    asked_again = set((modules / "asked").read_text().split())
    assert done_before.isdisjoint(asked_again)
    assert json.loads((output / "_summary.json").read_text()) | {"rows_per_s": None} == summary | {"rows_per_s": None}
    assert summary["rows"] == rows
    assert summary["scorers"]["slow"]["scored"] == rows


def test_a_classifier_that_fails_is_named_in_one_line(modules: Path, tmp_path: Path) -> None:
    (modules / "mended.py").write_text("def toxicity(texts):\n    return [float('nan')] * len(texts)\n")
    (tmp_path / "texts.csv").write_text("text\nyou fool\n")
    weak = ClassifierConfig(name="weak", kind="linear", model="mended:toxicity")
    with pytest.raises(RewardError, match=r"^classifier 'weak' returned 1 values that are not finite\Z") as raised:
        score_file(tmp_path / "texts.csv", tmp_path / "out", [weak], workers=1)
    # Whoever keeps the error does not keep the worker.
    deadline = time.monotonic() + 30
    while ray.available_resources()["CPU"] < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, f"CPUs are taken after {raised.value}"
        time.sleep(0.1)
    (modules / "mended.py").write_text("def toxicity(texts):\n    return [0.25] * len(texts)\n")
    summary = score_file(tmp_path / "texts.csv", tmp_path / "out", [weak], workers=1)
    assert summary["scorers"]["weak"]["mean_toxicity"] == 0.25


def test_gpus_that_ray_does_not_give_one_worker_are_refused(modules: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text\nyou fool\n")
    shares = [LINEAR.model_copy(update={"name": name, "num_gpus": 0.75}) for name in ("one", "two")]
    with pytest.raises(ConfigError, match=r"num_gpus of the classifiers are 1\.5 together, and above 1 Ray takes"):
        score_file(tmp_path / "texts.csv", tmp_path / "out", shares, workers=1)
