"""What a run needs, and the refusal of one that cannot fit."""

from pathlib import Path

import pytest
import transformers
from rich.console import Console
from typer.testing import CliRunner

from detox_ray.cli import app
from detox_ray.config import Config
from detox_ray.config_file import load_config
from detox_ray.errors import ConfigError
from detox_ray.memory_plan import GIB, RAY_BYTES, check_memory, memory_table, plan_memory
from detox_ray.sft_config import SFTConfig
from detox_ray.tuning_memory import plan_tuning_memory

pytestmark = pytest.mark.unit
LAPTOP = Path(__file__).parents[1] / "configs" / "laptop.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The configuration of a Llama of 0.7 B parameters, without weights."""
    folder = tmp_path_factory.mktemp("shape")
    transformers.LlamaConfig(num_hidden_layers=2, hidden_size=4096, intermediate_size=11008).save_pretrained(folder)
    return str(folder)


def configured(model: str, *overrides: str) -> Config:
    words = "[{name: words, kind: linear, model: 'profanity_check:predict_prob'}]"
    judge = "{name: judge, kind: linear, model: 'other:function'}"
    given = [f"policy.model={model}", f"reward.classifiers={words}", f"evaluation.judge={judge}", *overrides]
    return load_config(LAPTOP, ["rollout.engine=transformers", *given])


def test_roles_and_their_purposes(model: str) -> None:
    plan = plan_memory(configured(model, "policy.quantization=none", "train.num_gpus=1", "train.num_cpus=0"))
    learner, worker, classifier, _ = plan.roles
    parameters = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert learner.bytes["weights"] == 2 * parameters
    trained = 16 * 2 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert learner.bytes["trained"] == trained * 16
    on_cpu = plan_memory(configured(model, "policy.quantization=none")).roles[0]
    assert on_cpu.bytes["trained"] == trained * (16 + 36)  # a checkpoint, and the state to go back to
    assert (worker.count, worker.gpus, classifier.name) == (2, 0.0, "classifier words")
    console = Console(width=80, record=True)
    console.print(memory_table(plan))
    assert "1 x learner" in console.export_text()


def test_quantisation_makes_the_learner_smaller(model: str) -> None:
    none, nf4 = (plan_memory(configured(model, f"policy.quantization={q}")).roles[0] for q in ("none", "nf4"))
    assert nf4.bytes["weights"] < 0.6 * none.bytes["weights"]


def test_a_worker_in_parts(model: str) -> None:
    """On GPUs each part is on one of its own; on CPUs all are beside their actor, each with the pristine weights."""
    on_gpus, on_cpus = ("rollout.num_gpus={}", "rollout.num_cpus=1", "train.num_gpus=1"), ("rollout.sync=merged",)
    for where, weights, cache in ((on_gpus, 1 / 2, 1), (on_cpus, 3 / 2, 2)):
        whole, parted = (
            plan_memory(
                configured(model, "rollout.engine=vllm", f"rollout.tensor_parallel={n}", *(s.format(n) for s in where))
            ).roles[1]
            for n in (1, 2)
        )
        assert parted.bytes["weights"] == weights * whole.bytes["weights"]
        assert parted.bytes["cache"] == cache * whole.bytes["cache"]


def test_a_run_that_cannot_fit_is_refused(model: str) -> None:
    plan = plan_memory(configured(model, "policy.quantization=none", "train.num_gpus=1"))
    check_memory(plan, 24 * GIB, 64 * GIB)
    check_memory(plan, None, None)
    with pytest.raises(ConfigError, match=r"learner needs .* of a GPU and has 2\.0: set .*policy\.quantization=nf4"):
        check_memory(plan, 2 * GIB, 64 * GIB)
    with pytest.raises(ConfigError, match="main memory together and there are 1\\.0"):
        check_memory(plan, 24 * GIB, GIB)


def test_a_gpu_that_is_shared_in_turns(model: str) -> None:
    shared = ["policy.quantization=none", "rollout.num_gpus=0.5", "rollout.workers=1", "train.num_gpus=0.5"]
    together, in_turns = (plan_memory(configured(model, *shared, f"rollout.in_turns={turns}")) for turns in (0, 1))
    learner, worker, *_ = in_turns.roles
    learning, sampling = in_turns.gpu_need(learner)[0], in_turns.gpu_need(worker)[0]
    assert learning == learner.total + worker.bytes["process"]
    assert sampling == worker.total + learner.total - learner.bytes["batch"]
    assert f"{sampling / GIB:.1f} GiB while sampling, {learning / GIB:.1f} while learning" in in_turns.note
    size = max(learning, sampling)
    check_memory(in_turns, size, None)
    with pytest.raises(ConfigError, match=r"of a GPU and has"):
        check_memory(in_turns, 0.99 * size, None)
    with pytest.raises(ConfigError, match=r"of a GPU and has"):
        check_memory(together, size, None)


def test_what_a_role_on_a_gpu_has_in_main_memory(model: str) -> None:
    """A process, the pristine weights that pushes start from, and the weights of an engine that sleeps."""
    base = ["rollout.engine=vllm", "policy.quantization=none", "rollout.workers=1", "rollout.num_gpus=1"]
    served = plan_memory(configured(model, *base, "rollout.sync=adapter", "train.num_gpus=1"))
    learner, worker, *_ = served.roles
    process = worker.main_memory
    assert 0 < process < GIB
    trained = learner.bytes["trained"] / 16
    assert 36 * trained < learner.main_memory < 36 * trained + GIB
    assert served.main_memory == pytest.approx(RAY_BYTES + sum(role.main_memory for role in served.roles))

    weights = worker.bytes["weights"]
    merged = plan_memory(configured(model, *base, "train.num_gpus=1")).roles[1]
    assert merged.bytes == worker.bytes
    assert merged.main_memory == pytest.approx(process + weights)
    parted = plan_memory(
        configured(model, *base, "rollout.num_gpus=2", "rollout.tensor_parallel=2", "train.num_gpus=1")
    ).roles[1]
    assert parted.main_memory == pytest.approx(3 * process + 2 * weights)
    shared = ["rollout.num_gpus=0.5", "train.num_gpus=0.5", "rollout.in_turns=true"]
    in_turns = plan_memory(configured(model, *base, *shared)).roles[1]
    assert in_turns.main_memory == pytest.approx(process + 2 * weights + worker.bytes["trained"])


def test_every_classifier_that_is_loaded_counts(model: str, tmp_path: Path) -> None:
    """Also the model of a measurement, and a judge that is asked during training, on CPU."""
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    scorer = f"kind: {{}}, model: {tmp_path}, label: 1"
    for kind in ("transformers", "evaluate"):
        rewards = f"reward.classifiers=[{{name: reward, {scorer.format(kind)}}}]"
        *_, reward = plan_memory(configured(model, rewards, "evaluation.every=0")).roles
        assert reward.bytes["weights"] > 4 * 30522 * 768
        judge = f"evaluation.judge={{name: mine, num_gpus: 1, replicas: 2, {scorer.format(kind)}}}"
        *_, judging = plan_memory(configured(model, judge, "evaluation.every=5")).roles
        assert (judging.name, judging.count, judging.gpus) == ("judge mine", 1, 0.0)
        assert judging.bytes == reward.bytes


def test_the_transformers_engine_keeps_scores_and_has_no_cache_to_fill(model: str) -> None:
    few = ["rollout.max_num_seqs=8", "rollout.max_new_tokens=10"]
    plan = plan_memory(configured(model, *few))
    assert plan.roles[1].bytes["batch"] == 4 * 8 * 10 * 32000
    assert "a rollout worker advances 8 sequences of " in plan.note
    assert "cache" not in plan.note
    assert "KV cache holds" in plan_memory(configured(model, "rollout.engine=vllm", *few)).note


def test_the_command(model: str) -> None:
    given = [f"policy.model={model}", "rollout.engine=transformers", "train.num_gpus=1", "--gpu-memory-gib", "1"]
    result = CliRunner().invoke(app, ["plan", str(LAPTOP), *given])
    assert isinstance(result.exception, ConfigError)
    assert "2 x rollout" in result.output


def test_a_fine_tuning_has_learners_alone(model: str, tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(f"data: {{source: pairs.jsonl}}\npolicy: {{model: {model}}}\ntrain: {{microbatch_tokens: 2048}}\n")
    tuning = SFTConfig.model_validate({"policy": {"model": model}, "train": {"num_gpus": 1, "num_cpus": 0}})
    (learner,) = plan_tuning_memory(tuning).roles
    detoxification = plan_memory(configured(model, "train.num_gpus=1", "train.num_cpus=0")).roles[0]
    same = ("weights", "trained", "process")
    assert [learner.bytes[purpose] for purpose in same] == [detoxification.bytes[purpose] for purpose in same]
    halved = tuning.train.model_copy(update={"microbatch_tokens": 2048})
    (smaller,) = plan_tuning_memory(tuning.model_copy(update={"train": halved})).roles
    assert smaller.bytes["batch"] < 0.6 * learner.bytes["batch"]
    result = CliRunner().invoke(app, ["plan", str(path), "train.num_gpus=1", "--gpu-memory-gib", "1"])
    assert isinstance(result.exception, ConfigError)
    assert "train.microbatch_tokens=1024 (saves" in str(result.exception)
    assert "1 x learner" in result.output


def test_an_encoder_decoder_is_fine_tuned_within_the_same_tokens(tiny_t5: str) -> None:
    (learner,) = plan_tuning_memory(SFTConfig.model_validate({"policy": {"model": tiny_t5}})).roles
    assert learner.bytes["batch"] > 0
