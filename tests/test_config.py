from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from detox_ray import ConfigError, load_config
from detox_ray.cli import app
from detox_ray.config_file import dump_config, parse_config, parse_section
from detox_ray.config_section import Section
from detox_ray.meter_config import MeterConfig, meter_config
from detox_ray.sft_config import SFTConfig, load_sft_config

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[1]
MINIMAL: dict[str, Any] = {"reward": {"classifiers": [{"name": "a", "kind": "linear", "model": "x:y"}]}}


# The service's own file is tested in tests/serving, the evaluation's below.
OTHERS = {
    ROOT / "configs" / name for name in ("toxicity_api.yaml", "meter.yaml", "alt-profanity-check.calibration.yaml")
}
FINE_TUNINGS = sorted((ROOT / "configs").glob("sft-*.yaml"))
RUNS = sorted(set((ROOT / "configs").glob("*.yaml")) - OTHERS - {*FINE_TUNINGS})


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_every_shipped_config_is_valid_and_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("path", FINE_TUNINGS, ids=lambda p: p.name)
def test_every_shipped_fine_tuning_is_valid_and_survives_a_round_trip(path: Path) -> None:
    config = load_sft_config(path)
    assert parse_section(SFTConfig, yaml.safe_load(dump_config(config))) == config


def fields_of(section: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    """Every field of every kind of section, with its name; a field that is a section says what it is in its class."""
    for name, field in section.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            yield f"{section.__name__}.{name}", field
    for kind in section.__subclasses__():
        yield from fields_of(kind)


def test_every_key_is_described() -> None:
    import_module("detox_ray.serving.playground.request")  # the only kind that nothing here has imported
    assert {name for name, field in fields_of(Section) if not field.description} == set()


def test_the_shipped_evaluation_is_valid_and_survives_a_round_trip() -> None:
    config = meter_config(ROOT / "configs" / "meter.yaml")
    assert parse_section(MeterConfig, yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("file", "found"),
    [("toxicity_api.yaml", "cors_origins: []"), ("meter.yaml", "scorers:"), ("sft-lab.yaml", "patience:")],
)
def test_every_kind_of_configuration_can_be_printed(file: str, found: str) -> None:
    printed = CliRunner().invoke(app, ["config", str(ROOT / "configs" / file)])
    assert printed.exit_code == 0, printed.output
    assert found in printed.output


def test_overrides_are_typed_and_reach_into_lists() -> None:
    config = load_config(
        ROOT / "configs/laptop.yaml",
        [
            "ppo.learning_rate=1e-4",
            "reward.classifiers.0.weight=2",
            "policy.lora.targets=[q_proj, v_proj]",
            "name=x",
            "reward.shaping={short_penalty: 0}",
        ],
    )
    assert config.ppo.learning_rate == 1e-4
    assert config.reward.classifiers[0].weight == 2
    assert config.policy.lora.targets == ["q_proj", "v_proj"]
    assert config.reward.shaping.short_penalty == 0
    assert config.run_dir == Path("runs/x").resolve()
    assert load_config(ROOT / "configs/laptop.yaml", ["name=2024-01-31"]).name == "2024-01-31"


@pytest.mark.parametrize(
    "template",
    [
        "Summarize: {prompt}",
        "{prompt}",
        "{prompt} =>",
        "<human>: {prompt} <bot>: ",
        "#1# {prompt}",
        "Q {prompt} #1 A ",
        "- {prompt}",
    ],
)
def test_templates_are_texts(template: str) -> None:
    assert load_config(ROOT / "configs/laptop.yaml", [f"data.template={template}"]).data.template == template


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ppo": {"learning_rte": 1}}, r"unknown key 'ppo\.learning_rte'; did you mean 'learning_rate'\?"),
        ({"zzz": 1}, r"unknown key 'zzz'; valid keys: name, output_dir"),
        ({"ppo": {"clip_range": 3}}, r"ppo\.clip_range = 3: input should be less than 1"),
        ({"ppo": {"learning_rate": float("nan")}}, r"ppo\.learning_rate = nan"),
        ({"rollout": {"engine": "vlm"}}, r"rollout\.engine = 'vlm': input should be 'auto', 'vllm' or 'transformers'"),
        ({"name": "a/b"}, r"name = 'a/b'"),
        ({"data": {"min_tokens": 90}}, r"data\.min_tokens=90 is above data\.max_tokens=64"),
        ({"evaluation": {"prompts": 500}}, r"evaluation\.prompts=500 is above data\.heldout_prompts=200"),
        ({"ppo": {"batch_size": 30, "minibatches": 4}}, r"ppo\.batch_size=30 is not a multiple"),
        ({"ppo": {"estimator": "rloo"}}, r"set rollout\.samples_per_prompt"),
        ({"train": {"num_cpus": 0}}, r"train\.num_cpus=0: Ray Train places no learner that takes nothing; set 0\.1"),
        ({"rollout": {"num_gpus": 1.5}}, r"rollout\.num_gpus = 1\.5: above 1 Ray takes whole numbers only"),
        ({"train": {"num_gpus": 2.5}}, r"train\.num_gpus = 2\.5: above 1 Ray"),
        ({"rollout": {"in_turns": True}}, r"rollout\.in_turns=true shares one GPU: .* not 0 and 0"),
        (
            {"rollout": {"in_turns": True, "num_gpus": 0.5, "workers": 2}, "train": {"num_gpus": 0.5}},
            r"together at most 1, not 1 and 0\.5",
        ),
        (
            {"rollout": {"in_turns": True, "num_gpus": 0.5, "max_staleness": 1}, "train": {"num_gpus": 0.5}},
            r"needs rollout\.max_staleness=0",
        ),
        ({"reward": {}}, r"reward\.classifiers is missing"),
        (
            {"reward": {"classifiers": [{"name": "a", "kind": "transformers", "model": "m", "label": "NotHate"}]}},
            r"label=NotHate is what a civil text gets.*set label_means=nontoxic",
        ),
        (
            {"reward": {"classifiers": [{"name": "a", "kind": "linear", "model": "profanity_check:predict_prob"}]}},
            r"evaluation\.judge: 'profanity_check:predict_prob' is also in the reward.*name another judge",
        ),
        (
            {"reward": {"classifiers": [{**MINIMAL["reward"]["classifiers"][0], "num_gpus": 1.5}]}},
            r"classifiers\.0\.num_gpus = 1\.5: above 1 Ray",
        ),
        (
            {"reward": {"classifiers": [MINIMAL["reward"]["classifiers"][0]] * 2}},
            r"reward\.classifiers: name 'a' is used twice",
        ),
    ],
)
def test_what_is_wrong_is_named_with_the_fix(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.learning_rate", "expected key=value"),
        ("ppo.epochs.deep=1", "epochs"),
        ("reward.classifiers.7.weight=1", "'7' does not name a part"),
        ("ppo.epochs=[", r"ppo\.epochs = '\['"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs/laptop.yaml", [override])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="holds no settings"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "broken.yaml")
