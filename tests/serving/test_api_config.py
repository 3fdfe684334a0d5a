from collections.abc import Callable
from pathlib import Path

import pytest

from detox_ray.errors import ConfigError
from detox_ray.serving.api_config import ApiConfig, KeysConfig, load_api_config, load_keys

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
