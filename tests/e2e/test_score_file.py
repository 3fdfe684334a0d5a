"""A file scored on the real Ray Data: against the classifiers called directly; killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.data.lab import lab_path
from detox_ray.rewards.classifiers import load_classifier
from detox_ray.scoring.score_file import CHUNK_ROWS

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from detox_ray.classifier_config import ClassifierConfig
from detox_ray.errors import DetoxError
from detox_ray.scoring.score_file import score_file
if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    classifiers = [ClassifierConfig(**c) for c in arguments.pop("classifiers")]
    try:
        summary = score_file(classifiers=classifiers, **arguments)
    except DetoxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(summary))
"""
LINEAR = {"name": "linear", "kind": "linear", "model": "profanity_check:predict_prob"}
# Takes 2 ms a text, and writes down which rows it was asked for; the texts are the numbers of the rows.
SLOW = """
import os, time
def toxicity(texts):
    time.sleep(0.002 * len(texts))
    with open(os.environ["ASKED"], "a") as file:
        file.write("".join(f"{text}\\n" for text in texts))
    return [int(text) % 8 / 8 for text in texts]
"""
SLOW_SCORER = {"name": "slow", "kind": "linear", "model": "slow:toxicity"}


def command(**arguments: Any) -> list[str]:
    return [sys.executable, "-c", SCRIPT, json.dumps(arguments, default=str)]


def run(
    timeout_s: float = 900, env: dict[str, str] | None = None, **arguments: Any
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        command(**arguments), capture_output=True, text=True, timeout=timeout_s, check=False, env=environment, cwd=ROOT
    )


def summary_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def lab_transformer() -> dict[str, Any]:
    return {"name": "lab", "kind": "transformers", "model": str(lab_path("classifier")), "label": "rude"}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path, dict[str, Any], str]:
    """The rows of a file with everything that can be wrong with one, its folder of scores, the summary, the errors."""
    words = ["you", "fool", "thank", "friend", "the", "idea", "is", "stupid", "kind"]
    texts: list[str | None] = [" ".join(words[i % 9 :] * (1 + i % 5)) for i in range(1000)]
    texts[3], texts[500], texts[501], texts[999] = None, "", "nice day " * 20_000, "a nul \0 and 🙂"
    rows = [{"id": i, "reply": {"text": text, "by": "somebody"}, "tags": ["x", i]} for i, text in enumerate(texts)]
    folder = tmp_path_factory.mktemp("scored")
    lines = [json.dumps(row).encode() for row in rows]
    lines.insert(700, b'{"id": -1, "reply": {"text": "caf\xe9"}}')
    (folder / "texts.jsonl").write_bytes(b"\n".join(lines))
    result = run(
        path=folder / "texts.jsonl",
        output=folder / "out",
        classifiers=[lab_transformer(), LINEAR],
        text_column="reply.text",
        workers=2,
        quiet=True,
    )
    return rows, folder / "out", summary_of(result), result.stderr


def test_scores_are_those_of_the_classifiers_called_directly(scored: Any) -> None:
    rows, folder, _, _ = scored
    table = pq.read_table(folder)
    assert len(list(folder.glob("part-*.parquet"))) == -(-1000 // CHUNK_ROWS)
    texts = [row["reply"]["text"] for row in rows]
    kept = [i for i, text in enumerate(texts) if text is not None]
    by_scorer = {}
    for config in (ClassifierConfig(**lab_transformer()), ClassifierConfig(**LINEAR)):  # type: ignore[arg-type]  # values of several types
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
    assert summary["noted"] == {"empty text, scored": 1, "text scored on its first 100,000 characters": 1}
    for name in ("lab", "linear"):
        column = table[f"toxicity/{name}"].drop_null().to_numpy()
        assert summary["scorers"][name]["scored"] == 999
        assert summary["scorers"][name]["mean_toxicity"] == pytest.approx(column.mean())
        assert summary["scorers"][name]["share_toxic"] == pytest.approx((column >= 0.5).mean())
    assert printed == ""


def test_a_finished_scoring_is_not_repeated_and_another_is_refused(scored: Any) -> None:
    _, folder, summary, _ = scored
    arguments = {"path": folder.parent / "texts.jsonl", "output": folder, "text_column": "reply.text"}
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    started = time.monotonic()
    again = summary_of(run(**arguments, classifiers=[lab_transformer(), LINEAR]))
    assert again == summary | {"rows_per_s": None}
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")} == before
    other = run(**arguments, classifiers=[LINEAR])
    assert other.returncode == 1
    assert other.stderr.startswith("ConfigError:")
    assert "is of another scoring: its scorers is" in other.stderr
    assert time.monotonic() - started < 60


def start(folder: Path, arguments: dict[str, Any], asked: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}", "ASKED": asked}
    with open(folder / "run.log", "ab") as log:
        return subprocess.Popen(command(**arguments), stdout=log, stderr=log, env=environment, cwd=ROOT)


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


def test_a_killed_scoring_continues_without_a_row_twice_or_missing(tmp_path: Path) -> None:
    rows, output = 24 * CHUNK_ROWS + 17, tmp_path / "out"
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "texts.csv").write_text("row,text\n" + "".join(f"{i},{i}\n" for i in range(rows)))
    arguments = {"path": tmp_path / "texts.csv", "output": output, "classifiers": [SLOW_SCORER], "workers": 2}
    first = start(tmp_path, arguments, str(tmp_path / "first"))
    wait_for_parts(output, 4)
    driver = psutil.Process(first.pid)
    started = processes_of(driver)
    driver.send_signal(signal.SIGKILL)
    first.wait()
    _, left = psutil.wait_procs(started, timeout=120)
    assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    finished = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.glob("part-*")}
    assert 4 <= len(finished) < 25

    second = start(tmp_path, arguments, str(tmp_path / "second"))
    # One of its workers is killed as well, and is started again.
    wait_for_parts(output, len(finished) + 2)
    workers = [p for p in processes_of(psutil.Process(second.pid)) if "PartScorer" in p.cmdline()[0]]
    workers[0].send_signal(signal.SIGKILL)
    assert second.wait(timeout=600) == 0, (tmp_path / "run.log").read_text()

    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished} == finished
    table = pq.read_table(output)
    assert table["row"].to_pylist() == [str(i) for i in range(rows)]
    assert table["toxicity/slow"].to_pylist() == [i % 8 / 8 for i in range(rows)]
    done_before = {text for path in finished for text in pq.read_table(path)["text"].to_pylist()}
    asked_again = set((tmp_path / "second").read_text().split())
    assert done_before.isdisjoint(asked_again)
    summary = json.loads((output / "_summary.json").read_text())
    assert summary["rows"] == rows
    assert summary["scorers"]["slow"]["scored"] == rows


def test_a_classifier_that_fails_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text("def toxicity(texts):\n    return [float('nan')] * len(texts)\n")
    (tmp_path / "texts.csv").write_text("text\nyou fool\n")
    scorer = {"name": "weak", "kind": "linear", "model": "failing:toxicity"}
    environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    arguments = {"path": tmp_path / "texts.csv", "output": tmp_path / "out", "classifiers": [scorer], "workers": 1}
    failed = run(env=environment, **arguments)
    assert failed.returncode == 1
    assert failed.stderr.strip() == "RewardError: classifier 'weak' returned 1 values that are not finite"
    (tmp_path / "failing.py").write_text("def toxicity(texts):\n    return [0.25] * len(texts)\n")
    summary = summary_of(run(env=environment, **arguments))
    assert summary["scorers"]["weak"]["mean_toxicity"] == 0.25
