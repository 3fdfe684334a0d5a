"""`detox-ray calibrate` from a file to the table a service reads, with real classifiers."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import profanity_check
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from detox_ray import cli
from detox_ray.calibration import MIN_OF_EACH, in_fitted_half
from detox_ray.rewards.probability_calibration import calibrated, fit_temperature
from detox_ray.serving.api_config import load_api_config
from detox_ray.serving.calibration_table import check_models, fitted_model

pytestmark = pytest.mark.unit
Calibrate = Callable[..., None]

OPENINGS = (
    "you are a",
    "what a",
    "thank you for the",
    "this is a",
    "that was a",
    "he has a",
    "we saw a",
    "she wrote a",
)
RUDE = ("stupid idea", "dumb fool", "damn shame", "idiot plan", "pathetic loser", "sucker trick")
CIVIL = ("lovely day", "kind letter", "good plan", "long walk", "quiet house", "warm welcome")


@pytest.fixture
def service(tmp_path: Path) -> Path:
    words = {"kind": "linear", "model": "profanity_check:predict_prob", "output": "probability", "calibration": "none"}
    tree = {
        "reward": {"classifiers": [{"name": "words", **words}, {"name": "soft", **words, "temperature": 3.0}]},
        "attributes": {"TOXICITY": {}, "PROFANITY": {"classifier": "soft"}},
    }
    path = tmp_path / "service.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """960 texts, about half of them rude; one label in ten is wrong, and some numbers are not there."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(10):
        for opening in OPENINGS:
            for rude, endings in ((True, RUDE), (False, CIVIL)):
                for ending in endings:
                    toxic = rude if rng.random() < 0.9 else not rude
                    reference = round(float(np.clip(0.7 * rude + 0.3 * rng.random(), 0, 1)), 3)
                    rows.append(
                        {"text": f"{opening} {ending} number {number}", "toxic": int(toxic), "score": reference}
                    )
    for row in rows[:7]:
        row["score"] = None
    rows.append({"text": "a zebra without a label", "toxic": None, "score": None})
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"row": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def calibrate(monkeypatch: pytest.MonkeyPatch) -> Calibrate:
    def run(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["detox-ray", "calibrate", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        if stopped.value.code:
            raise RuntimeError(f"exit code {stopped.value.code}")

    return run


def test_from_the_file_to_the_service(
    calibrate: Calibrate, service: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    columns = ("--text-column", "row.text", "--labels", "TOXICITY=row.toxic", "--reference", "TOXICITY=row.score")
    calibrate(texts, "--config", service, "--output", out, *columns, "--method", "temperature")
    shown = capsys.readouterr().out
    assert "attribute TOXICITY" in " ".join(shown.split())
    assert shown.strip().endswith("calibration.html")
    files = ["calibration.html", "calibration.json", "calibration.md", "calibration.yaml"]
    assert sorted(path.name for path in out.iterdir()) == files
    for path in out.iterdir():
        assert not any(ending in path.read_text(encoding="utf-8") for ending in (*RUDE, *CIVIL, "zebra without"))

    # The fit, by hand: one classifier on one half of the texts.
    rows = [json.loads(line)["row"] for line in texts.read_text().splitlines()][:-1]
    half = in_fitted_half([row["text"] for row in rows], seed=0)
    toxic = np.array([row["toxic"] for row in rows], dtype=bool)
    raw = profanity_check.predict_prob([row["text"] for row in rows])
    tree = yaml.safe_load((out / "calibration.yaml").read_text())
    found = tree["classifiers"]["words"]
    expected = fit_temperature(raw[half].astype(np.float32), toxic[half])
    assert found["temperature"] == pytest.approx(expected.temperature, abs=1e-3)
    assert (found["texts"], found["toxic"]) == (half.sum(), toxic[half].sum())
    assert "categories" not in tree

    report = json.loads((out / "calibration.json").read_text())
    assert (report["rows"], report["texts"], report["missing"]) == (961, 960, {"row.toxic": 0, "row.score": 7})
    assert report["left_out"] == {"no label and no score (first in line 961)": 1}
    assert [f["key"] for f in report["fitted"]] == ["classifiers.words", "classifiers.soft", "attributes.TOXICITY"]
    words = report["fitted"][0]
    assert (words["heldout_texts"], words["heldout_toxic"]) == ((~half).sum(), toxic[~half].sum())
    assert words["change"]["before"]["roc_auc"]["value"] == pytest.approx(
        roc_auc_score(toxic[~half], raw[~half]), abs=1e-5
    )
    assert words["change"]["log_loss_change"]["high"] < 0
    [agreed] = report["agreements"]
    scored = np.array([row["score"] is not None for row in rows])
    assert agreed["texts"] == (~half & scored).sum()

    # The service takes the table, and answers what was measured.
    tree = yaml.safe_load(service.read_text()) | {"calibration": str(out / "calibration.yaml")}
    service.write_text(yaml.safe_dump(tree))
    config = load_api_config(service)
    check_models(config.calibration, {c.name: fitted_model(c) for c in config.reward.classifiers})
    assert list(config.calibration.attributes) == ["TOXICITY"]
    ours = calibrated(raw, config.calibration.classifiers["words"])
    assert ((ours - toxic)[~half] ** 2).mean() < ((raw - toxic)[~half] ** 2).mean()


def test_a_reference_alone_fits_nothing(calibrate: Calibrate, service: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calibrate(
        *(texts, "--config", service, "--output", out, "--text-column", "row.text"),
        *("--reference", "TOXICITY=row.score", "--reference", "words=row.score"),
    )
    assert not (out / "calibration.yaml").exists()
    report = json.loads((out / "calibration.json").read_text())
    assert [(a["key"], a["texts"], a["after"]) for a in report["agreements"]] == [
        ("attributes.TOXICITY", 953, None),
        ("classifiers.words", 953, None),
    ]
    assert report["fitted"] == []
    assert "Reliability" not in (out / "calibration.html").read_text(encoding="utf-8")


def test_a_seed_chooses_the_half_and_like_texts_stay_together() -> None:
    texts = [f"text {i}" for i in range(400)]
    first, second = in_fitted_half(texts, 0), in_fitted_half(texts, 1)
    assert 150 < first.sum() < 250
    assert 100 < (first != second).sum() < 300
    assert (in_fitted_half([f" TEXT  {i} " for i in range(400)], 0) == first).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do: give --labels NAME=COLUMN"),
        (("--labels", "TOXICITY"), "--labels 'TOXICITY': expected NAME=COLUMN"),
        (("--labels", "TOXICITY=a", "--labels", "TOXICITY=b"), "TOXICITY has the column 'a' already"),
        (
            ("--labels", "INSULT=row.toxic"),
            "'INSULT' is no attribute, category or classifier of the service, which has",
        ),
        (("--labels", "TOXICITY=row.toxi"), "has no column 'row.toxi'"),
        (("--reference", "words=score"), "did you mean 'row.score'?"),
        (("--labels", "TOXICITY=row.one"), "one half of the texts has 0 toxic and"),
        (("--labels", "TOXICITY=row.few"), f"each needs at least {MIN_OF_EACH} of both: give more texts"),
        (("--labels", "TOXICITY=row.text"), "holds something that is no number"),
        (("--labels", "TOXICITY=row.toxic", "--text-column", "row.words"), "has no column 'row.words'"),
        (("--labels", "TOXICITY=row.toxic", "--config", "nowhere.yaml"), "config nowhere.yaml"),
        (("--labels", "TOXICITY=row.toxic", "--output", "texts.jsonl"), "texts.jsonl is a file: give a folder"),
        (("--labels", "TOXICITY=row.toxic", "--config", "broken.yaml"), "cannot be imported"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read_by_a_classifier(
    calibrate: Calibrate,
    service: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    def loaded(config: object) -> None:
        raise AssertionError("a classifier was loaded")

    monkeypatch.setattr("detox_ray.calibration.load_classifier", loaded)
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"hello {i}", "toxic": i % 2, "score": 0.5, "one": 0, "few": int(i < 50) if i < 60 else None}
        for i in range(300)
    ]
    Path("texts.jsonl").write_text("".join(json.dumps({"row": row}) + "\n" for row in rows))
    Path("broken.yaml").write_text(service.read_text().replace("profanity_check:", "nowhere:"))
    with pytest.raises(RuntimeError, match="exit code 2"):
        calibrate("texts.jsonl", "--config", service, "--text-column", "row.text", *arguments)
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert message in error
    assert "hello" not in error
    assert not Path("runs").exists()
