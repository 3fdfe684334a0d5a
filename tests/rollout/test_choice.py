import pytest

from detox_ray.config import RolloutConfig
from detox_ray.errors import ConfigError
from detox_ray.records import Prompt
from detox_ray.rollout import engine
from detox_ray.rollout.engine import choose_engine
from detox_ray.schedule import Schedule

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("FalconForCausalLM", ("vllm", "merged")),
        ("GPT2LMHeadModel", ("vllm", "merged")),
        ("GPTJForCausalLM", ("vllm", "merged")),
        ("GPTNeoForCausalLM", ("transformers", "adapter")),
        ("GPTNeoXForCausalLM", ("vllm", "merged")),
        ("LlamaForCausalLM", ("vllm", "merged")),
        ("OPTForCausalLM", ("vllm", "merged")),
        ("Qwen2ForCausalLM", ("vllm", "merged")),
        ("Qwen3ForCausalLM", ("vllm", "merged")),
        ("BloomForCausalLM", ("transformers", "adapter")),
        ("MptForCausalLM", ("transformers", "adapter")),
    ],
)
def test_auto_knows_what_vllm_serves(architecture: str, expected: tuple[str, str]) -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    kind, sync, reason = choose_engine(RolloutConfig(), architecture)
    assert (kind, sync) == expected
    assert architecture in reason


def test_without_vllm_transformers_is_chosen_and_vllm_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_why_not_vllm", lambda architecture, num_gpus: engine.NOT_INSTALLED)
    assert choose_engine(RolloutConfig(), "LlamaForCausalLM") == ("transformers", "adapter", "vLLM is not installed")
    with pytest.raises(ConfigError, match="vLLM is not installed; install"):
        choose_engine(RolloutConfig(engine="vllm"), "LlamaForCausalLM")


def test_vllm_built_for_gpus_is_not_given_one_that_the_configuration_does_not_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    monkeypatch.setattr(engine, "is_built_for_cpu", lambda: False)
    kind, _, reason = choose_engine(RolloutConfig(), "LlamaForCausalLM")
    assert (kind, reason) == ("transformers", "the vLLM installed is the build for GPUs, and rollout.num_gpus=0")
    assert choose_engine(RolloutConfig(num_gpus=1), "LlamaForCausalLM")[0] == "vllm"


def test_vllm_for_what_it_does_not_serve_is_refused() -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    with pytest.raises(ConfigError, match=r"does not serve GPTNeoForCausalLM; .*set rollout\.engine=transformers"):
        choose_engine(RolloutConfig(engine="vllm"), "GPTNeoForCausalLM")


@pytest.mark.parametrize(
    ("settings", "architecture", "message"),
    [
        ({"sync": "adapter"}, "GPT2LMHeadModel", r"no LoRA for GPT2LMHeadModel; use rollout\.sync=merged"),
        ({"sync": "merged"}, "GPTNeoForCausalLM", r"rollout\.sync=merged needs the vllm engine"),
        ({"engine": "transformers", "tensor_parallel": 2}, "LlamaForCausalLM", r"tensor_parallel=2 needs the vllm eng"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, architecture: str, message: str) -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    with pytest.raises(ConfigError, match=message):
        choose_engine(RolloutConfig(**settings), architecture)


def test_the_schedule_passes_over_all_prompts_and_needs_no_state() -> None:
    prompts = [Prompt(str(i), str(i), (i,)) for i in range(10)]
    schedule = Schedule(prompts, per_step=4, seed=1)
    seen = [p.id for step in range(5) for p in schedule(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(p.id for p in prompts)
    assert seen[:10] != seen[10:]
    assert Schedule(prompts, 4, 1)(3) == schedule(3)
    assert Schedule(prompts, 4, 2)(0) != schedule(0)
