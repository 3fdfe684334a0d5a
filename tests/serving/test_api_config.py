from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from detox_ray.classifier_config import Calibration
from detox_ray.errors import ConfigError
from detox_ray.run_folder import RunFolder
from detox_ray.serving.api_config import ApiConfig, KeysConfig, load_api_config, load_keys
from detox_ray.serving.calibration_table import CalibrationTable

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_the_documented_file_is_the_embedded_configuration() -> None:
    assert load_api_config(ROOT / "configs" / "toxicity_api.yaml") == ApiConfig() == load_api_config(None)


def test_a_training_runs_file_is_served_for_its_reward() -> None:
    config = load_api_config(ROOT / "configs" / "laptop.yaml")
    assert [c.name for c in config.reward.classifiers] == ["lab-transformer", "lab-linear"]
    assert config.limits == ApiConfig().limits


def test_a_training_runs_file_takes_the_services_settings_and_keeps_its_own_of_ray(
    refused_line: Callable[..., str],
) -> None:
    file = ROOT / "configs" / "laptop.yaml"
    config = load_api_config(file, ["http.port=9000", "limits.texts=3", "ray.num_cpus=3"])
    assert (config.http.port, config.limits.texts, config.ray.num_cpus) == (9000, 3, 3)
    assert "did you mean 'policy'" in refused_line("serve", str(file), "polici.model=x")


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    assert ApiConfig().http.host == "127.0.0.1"
    assert load_api_config(None, ["http.host=0.0.0.0"]).http.host == "0.0.0.0"


@pytest.mark.parametrize("content", [None, "cache_texts: 5"])
def test_an_override_changes_what_it_names_alone(tmp_path: Path, content: str | None) -> None:
    file = None
    if content is not None:
        file = tmp_path / "service.yaml"
        file.write_text(content)
    changes = ["attributes.TOXICITY.languages=[en,de]", "categories.hate={}", "reward.timeout_s=60"]
    found = load_api_config(file, changes)
    assert [c.name for c in found.reward.classifiers] == ["alt-profanity-check", "lab-transformer"]
    assert found.reward.timeout_s == 60
    toxicity = found.attributes["TOXICITY"]
    assert (toxicity.classifier, toxicity.languages) == ("alt-profanity-check", ["en", "de"])
    assert found.categories["harassment"].classifier == "alt-profanity-check"
    # And nobody else's.
    assert load_api_config(None) == ApiConfig()


def test_a_tree_will_do_and_stays_as_it_is() -> None:
    tree = {"cache_texts": 5, "calibration": {}}
    assert load_api_config(tree, ["http.port=9000"]) == load_api_config(None, ["cache_texts=5", "http.port=9000"])
    assert tree == {"cache_texts": 5, "calibration": {}}


def test_the_file_in_a_runs_folder_is_served_with_what_the_run_fitted(tmp_path: Path) -> None:
    classifiers = [
        {"name": "fitted", "kind": "linear", "model": "a:b"},
        {"name": "given", "kind": "linear", "model": "c:d", "calibration": {"mean": 1, "std": 2}},
    ]
    tree = {"policy": {"model": "some/model"}, "reward": {"classifiers": classifiers}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    first, second = load_api_config(tmp_path / "config.yaml").reward.classifiers
    assert first.calibration == "fit"
    RunFolder(tmp_path).write_calibrations({name: Calibration(mean=3, std=4) for name in ("fitted", "given")})
    first, second = load_api_config(tmp_path / "config.yaml").reward.classifiers
    assert (first.calibration, second.calibration) == (Calibration(mean=3, std=4), Calibration(mean=1, std=2))
    first, _ = load_api_config(tmp_path / "config.yaml", ["reward.classifiers.0.calibration=none"]).reward.classifiers
    assert first.calibration == "none"


def test_paths_may_be_relative_or_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    for model in ("model", "~/model"):
        words = f"{{name: words, kind: linear, model: {model}}}"
        changes = [f"reward.classifiers=[{words}]", "attributes={TOXICITY: {}}", "categories={}"]
        [found] = load_api_config(None, changes).reward.classifiers
        assert found.model == str(tmp_path / "model")
    (tmp_path / "keys").write_text("one")
    assert load_keys(KeysConfig(file="~/keys")) == ("one",)
    (tmp_path / "table.yaml").write_text("{}")
    assert load_api_config(None, ["calibration=~/table.yaml"]).calibration == CalibrationTable()


def test_an_override_needs_no_file(refused_line: Callable[..., str]) -> None:
    assert "http.port" in refused_line("serve", "http.port=99999", "http.host=0.0.0.0")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("limits.text=5", "unknown key 'limits.text'; did you mean 'texts'"),
        ("limits.texts=0", "limits.texts = 0"),
        ("attributes={INSULT: {classifier: nobody}}", "attributes.INSULT.classifier='nobody' is no classifier"),
        ("attributes={INSULT: {label: insult}}", "attributes.INSULT.label='insult' needs a classifier"),
        ("categories={rudeness: {}}", "rudeness"),
        ("replicas={nobody: {min: 1}}", "replicas.nobody is no classifier"),
        ("replicas={lab-transformer: {min: 3, max: 2}}", "replicas.min=3 is above replicas.max=2"),
        ("limits.queued_texts=1000", "limits.queued_texts=1000 is below"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_api_config(None, [override])
    assert message in str(error.value)


def test_keys_come_from_a_variable_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst\n\n second \n")
    monkeypatch.setenv("KEYS_OF_A_TEST", "third, first,")
    assert load_keys(KeysConfig(file=str(path), environment="KEYS_OF_A_TEST")) == ("first", "second", "third")
    assert load_keys(KeysConfig()) == ()


@pytest.mark.parametrize("keys", [KeysConfig(environment="KEYS_OF_NOBODY"), KeysConfig(file="no/such/file")])
def test_a_service_is_not_left_open_by_mistake(keys: KeysConfig) -> None:
    with pytest.raises(ConfigError, match="keys"):
        load_keys(keys)
