"""What an evaluation is made of, from a run folder, a model, a file or a YAML file."""

import json
from pathlib import Path

import pytest

from detox_ray import ConfigError
from detox_ray.config_file import dump_config, parse_config
from detox_ray.meter_config import load_scorers, meter_config
from detox_ray.sft_config import SFTConfig

pytestmark = pytest.mark.unit

REWARD = {"classifiers": [{"name": "a", "kind": "linear", "model": "x:y"}]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    (folder / "adapter").mkdir(parents=True)
    config = parse_config({"name": "mine", "seed": 3, "reward": REWARD, "data": {"source": "p.txt"}})
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def test_a_run_is_its_base_and_its_adapter_on_its_held_out_prompts(run: Path) -> None:
    meter = meter_config(run, ["prompts=7", "rollout.samples_per_prompt=25"])
    assert [(s.name, s.policy.adapter) for s in meter.systems if s.policy] == [
        ("base", None),
        ("tuned", str(run / "adapter")),
    ]
    assert (meter.heldout_of_run, meter.seed, meter.prompts, meter.rollout.samples_per_prompt) == (True, 3, 7, 25)
    assert [scorer.name for scorer in meter.scorers] == ["alt-profanity-check", "a"]
    assert meter.folder == run


def test_the_adapter_that_a_run_started_from_is_evaluated_beside_it(run: Path) -> None:
    policy = {"adapter": "runs/sft/adapter", "reference": "adapter"}
    config = parse_config({"name": "mine", "reward": REWARD, "data": {"source": "p.txt"}, "policy": policy})
    (run / "config.yaml").write_text(dump_config(config))
    meter = meter_config(run).with_absolute_paths()
    assert [(s.name, s.policy.adapter) for s in meter.systems if s.policy] == [
        ("base", None),
        ("fine-tuned", "runs/sft/adapter"),
        ("tuned", str(run / "adapter")),
    ]
    assert len({s.policy.base_identity for s in meter.systems if s.policy}) == 1


@pytest.mark.parametrize("override", ["seed=4", "data.source=q.txt", "data.heldout_prompts=500", "data.max_tokens=9"])
def test_training_prompts_never_count_as_held_out(run: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="would count as held out"):
        meter_config(run, [override])
    with pytest.raises(ConfigError, match="would replace the evaluation of mine"):
        meter_config(run, [override, "heldout_of_run=false"])
    assert meter_config(run, [override, "heldout_of_run=false", "name=other"]).folder == run.parent / "other"


def test_a_fine_tuning_is_its_base_and_its_adapter_on_the_prompts_of_its_dev_examples(run: Path) -> None:
    tuning = SFTConfig.model_validate({"name": "mine", "seed": 5, "data": {"max_tokens": 99}, "policy": {"model": "m"}})
    (run / "config.yaml").write_text(dump_config(tuning))
    with pytest.raises(ConfigError, match=r"dev_prompts.jsonl is missing; the command that started the run"):
        meter_config(run)
    (run / "dev_prompts.jsonl").write_text('{"prompt": "Human: hello\\nAssistant:"}\n')
    meter = meter_config(run, ["prompts=7"])
    assert [(s.name, s.policy.adapter) for s in meter.systems if s.policy] == [
        ("base", None),
        ("fine-tuned", str(run / "adapter")),
    ]
    assert (meter.data.source, meter.data.max_tokens, meter.data.template) == (
        str(run / "dev_prompts.jsonl"),
        99,
        "none",
    )
    assert (meter.heldout_of_run, meter.seed, meter.prompts, meter.perplexity_model) == (False, 5, 7, "m")
    assert [scorer.name for scorer in meter.scorers] == ["alt-profanity-check"]
    with pytest.raises(ConfigError, match="other prompts would replace the evaluation of mine"):
        meter_config(run, ["data.source=other.jsonl"])
    assert meter_config(run, ["data.source=other.jsonl", "name=other"]).folder == run.parent / "other"


def test_a_model_and_a_file(tmp_path: Path) -> None:
    model = meter_config("some/model")
    assert model.systems[0].policy is not None
    assert (model.systems[0].policy.model, model.perplexity_model) == ("some/model", "some/model")
    assert model.rollout.samples_per_prompt == 25
    shorter = meter_config("some/model", ["rollout.max_new_tokens=5"]).rollout
    assert (shorter.samples_per_prompt, shorter.max_new_tokens) == (25, 5)
    assert meter_config("some/model", ["rollout.samples_per_prompt=4"]).rollout.samples_per_prompt == 4
    file = meter_config("answers.csv", ["systems.0.columns.response=said"])
    assert (file.systems[0].responses, file.systems[0].columns.response) == ("answers.csv", "said")
    assert file.perplexity_model is None
    with pytest.raises(ConfigError, match="neither a run folder"):
        meter_config(tmp_path)


def test_a_system_is_a_model_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "meter.yaml"
    path.write_text("systems: [{name: both, responses: a.csv, policy: {model: m}}]")
    with pytest.raises(ConfigError, match="give either policy or responses"):
        meter_config(path)
    path.write_text("systems: [{name: a, responses: a.csv}, {name: a, responses: b.csv}]")
    with pytest.raises(ConfigError, match="name 'a' is used twice"):
        meter_config(path)
    path.write_text("systems: [{name: a, responses: a.csv}]\nprompt: 5")
    with pytest.raises(ConfigError, match="did you mean 'prompts'"):
        meter_config(path)


def test_scorers_of_every_kind_of_file_and_of_none(run: Path, tmp_path: Path) -> None:
    def names(path: Path | None) -> list[str]:
        return [scorer.name for scorer in load_scorers(path).scorers]

    reward = f"reward: {json.dumps(REWARD)}\n"
    service, evaluation = tmp_path / "service.yaml", tmp_path / "evaluation.yaml"
    service.write_text(f"{reward}attributes: {{TOXICITY: {{classifier: a}}}}\n")
    evaluation.write_text(f"systems: [{{name: x, responses: x.csv}}]\nscorers: {json.dumps(REWARD['classifiers'])}\n")
    assert names(run / "config.yaml") == ["alt-profanity-check", "a"]
    assert names(service) == names(evaluation) == ["a"]
    assert names(None) == ["alt-profanity-check", "lab-transformer"]
