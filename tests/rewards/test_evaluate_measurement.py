"""Through the real `evaluate.load`, of a measurement in the format of the published one."""

import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config_file import parse_config
from detox_ray.errors import ConfigError, ModelError, RewardError
from detox_ray.rewards.classifiers import check_classifier, load_classifier

pytestmark = pytest.mark.unit

TEXTS = ["you are a stupid fool", "", "thank you for the kind help", "shut up", "what a fine day"]
MINILM = Path(__file__).resolve().parents[3] / "shared" / "models" / "minilm-toxicity"
MEASUREMENT = """
import datasets
import evaluate
from transformers import pipeline


class Rudeness(evaluate.Measurement):
    def _info(self):
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description="P(label) of each text",
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": datasets.Value("string", id="sequence")}),
        )

    def _download_and_prepare(self, dl_manager):
        self.classify = pipeline("text-classification", model=self.config_name, top_k=None, truncation=True)

    def _compute(self, predictions, toxic_label="hate"):
        if "boom" in predictions:
            raise ValueError("cannot read " + predictions[0])
        scores = [{r["label"]: r["score"] for r in result}[toxic_label] for result in self.classify(predictions)]
        return {"toxicity": scores}
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A measurement's folder; what evaluate copies and writes goes to a folder of the test's own."""
    import evaluate

    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
        patch.setattr(sys, "path", list(sys.path))
        (folder / "rudeness").mkdir()
        (folder / "rudeness" / "rudeness.py").write_text(MEASUREMENT)
        yield folder / "rudeness"


def config(model: Path, module: Path | str, **changes: Any) -> ClassifierConfig:
    return ClassifierConfig(
        **{"name": "measured", "kind": "evaluate", "model": str(model), "module": str(module), **changes}
    )


@pytest.mark.skipif(not MINILM.is_dir(), reason="no shared models beside the repository")
@pytest.mark.parametrize("output", ["logit", "logprob", "probability"])
def test_equals_our_own_classifier_of_the_same_model(module: Path, output: str) -> None:
    before = sorted(MINILM.iterdir())
    measured = load_classifier(config(MINILM, module, output=output))
    own = load_classifier(ClassifierConfig(name="own", kind="transformers", model=str(MINILM), output=output))
    np.testing.assert_allclose(measured.toxicity(TEXTS), own.toxicity(TEXTS), atol=1e-5)
    assert measured.toxicity(TEXTS)[0] > 0.5 > measured.toxicity(TEXTS)[2]
    if output != "logit":
        # The logit of a label is its odds only where there are no other labels.
        np.testing.assert_allclose(measured.score(TEXTS), own.score(TEXTS), atol=1e-3)
    assert sorted(MINILM.iterdir()) == before, "evaluate writes nothing into the model"


def test_labels_scripts_and_repeated_calls(module: Path, two_labels: Path) -> None:
    by_name = load_classifier(config(two_labels, module))
    by_index = load_classifier(config(two_labels, module / "rudeness.py", label=1))
    turned = load_classifier(config(two_labels, module, label="neutral", label_means="nontoxic"))
    expected = load_classifier(ClassifierConfig(name="own", kind="transformers", model=str(two_labels))).toxicity(TEXTS)
    for classifier in (by_name, by_index, turned, by_name):
        toxicity = classifier.toxicity(TEXTS)
        assert toxicity.dtype == np.float32
        np.testing.assert_allclose(toxicity, expected, atol=1e-5)
    assert by_name.score([]).shape == (0,)


@pytest.fixture
def hub(module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on loopback that has the measurement as `toxicity`; yields the paths it was asked for."""
    import evaluate

    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            found = self.path.endswith("/toxicity.py")
            body = (module / "rudeness.py").read_bytes() if found else b""
            self.send_response(200 if found else 404)
            for name, value in {"Content-Length": str(len(body)), "ETag": '"1"'}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/spaces/{{path}}/resolve/{{revision}}/{{name}}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(evaluate.config, "HUB_EVALUATE_URL", address)
    monkeypatch.setattr(evaluate.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(evaluate.config, "DOWNLOADED_EVALUATE_PATH", tmp_path / "downloads")
    yield asked
    server.shutdown()
    server.server_close()


def test_code_from_the_hub_runs_only_when_it_is_trusted(hub: list[str], two_labels: Path) -> None:
    for check in (check_classifier, load_classifier):
        for name in ("toxicity", "someone/toxicity"):
            with pytest.raises(ConfigError, match=rf"'{name}' is code from the hub.*set trust_module: true"):
                check(config(two_labels, name))
        with pytest.raises(ModelError, match="does not exist; give a script"):
            check(config(two_labels, "/nowhere/toxicity"))
    assert not hub, "nothing is even downloaded"
    trusted = config(two_labels, "toxicity", trust_module=True)
    check_classifier(trusted)
    rude, civil = load_classifier(trusted).toxicity([TEXTS[0], TEXTS[2]])
    assert rude > 0.5 > civil
    assert hub[-1].startswith("/spaces/evaluate-measurement/toxicity/resolve/")
    with pytest.raises(ModelError, match="cannot load measurement 'no-such-measurement'"):
        load_classifier(config(two_labels, "no-such-measurement", trust_module=True))


def test_what_is_wrong_with_the_model(module: Path, two_labels: Path, tmp_path: Path) -> None:
    for check in (check_classifier, load_classifier):
        with pytest.raises(ConfigError, match=r"no label 'hate'; its labels: 0=neutral, 1=toxic"):
            check(config(two_labels, module, label="hate"))
        with pytest.raises(ModelError, match="does not exist"):
            check(config(tmp_path / "absent", module))
        with pytest.raises(ConfigError, match="download revision 'v2'"):
            check(config(two_labels, module, revision="v2"))
        shutil.copy(two_labels / "config.json", tmp_path)
        with pytest.raises(ModelError, match=r"no \*\.safetensors"):
            check(config(tmp_path, module))


def test_what_is_wrong_with_the_measurement(module: Path, two_labels: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import a_package_that_is_not_here\n" + MEASUREMENT)
    with pytest.raises(ModelError, match=r"cannot load measurement .*broken.*a_package_that_is_not_here"):
        load_classifier(config(two_labels, broken))
    with pytest.raises(RewardError, match="failed on 2 texts with ValueError") as error:
        load_classifier(config(two_labels, module)).score(["you fool", "boom"])
    assert "you fool" not in str(error.value)


def test_paths_for_other_processes(module: Path, monkeypatch: pytest.MonkeyPatch, two_labels: Path) -> None:
    monkeypatch.chdir(module.parent)
    (module.parent / "toxicity").mkdir()
    members = [
        {"name": "local", "kind": "evaluate", "model": str(two_labels), "module": "rudeness"},
        {"name": "hub", "kind": "evaluate", "model": str(two_labels), "module": "toxicity", "trust_module": True},
    ]
    local, hub = parse_config({"reward": {"classifiers": members}}).with_absolute_paths().reward.classifiers
    assert local.module == str(module / "rudeness.py")
    assert hub.module == "toxicity", "a folder that happens to have the name is no measurement"


def test_a_judge_of_the_same_model_is_no_judge(two_labels: Path) -> None:
    model = str(two_labels)
    with pytest.raises(ConfigError, match="is also in the reward"):
        parse_config(
            {
                "reward": {"classifiers": [{"name": "a", "kind": "transformers", "model": model}]},
                "evaluation": {"judge": {"name": "b", "kind": "evaluate", "model": model, "trust_module": True}},
            }
        )
