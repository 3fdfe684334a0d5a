"""Paths and small real models that several rooms' tests share."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, character_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real data and models beside the checkout; tests that need them are skipped elsewhere."""
    if not (SHARED / "models").is_dir():
        pytest.skip("the shared data and models are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that this process and those of `local_ray` import from."""
    folder = tmp_path_factory.mktemp("modules")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def local_ray(modules: Path) -> Iterator[Path]:
    """One local Ray of two CPUs for all tests that talk to it directly; yields its session folder."""
    switches = ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")
    os.environ.update(dict.fromkeys(switches, "0"))
    import ray
    from ray import serve

    rooms = [Path(__file__).parent / room for room in ("", "rollout", "serving")]
    imported_from = os.pathsep.join(map(str, [*rooms, modules]))
    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": imported_from, "OMP_NUM_THREADS": "1"}},
    )
    yield Path(context.address_info["session_dir"])
    serve.shutdown()
    ray.shutdown()


Refused = Callable[..., str]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process were connected to no Ray, whatever other tests have started; for what starts none."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.fixture
def refused_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `detox-ray` with arguments; returns the one line it is refused with."""
    from detox_ray import cli

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["detox-ray", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert "\n" not in error
        return error

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of 0.2M parameters with its tokenizer, as a folder in Hugging Face format."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


SaveT5 = Callable[..., str]


@pytest.fixture(scope="session")
def save_tiny_t5() -> SaveT5:
    """Writes a random T5 of 0.2M parameters with its tokenizer: the first T5, or one of version 1.1 (as Flan-T5)."""
    from tokenizers.processors import TemplateProcessing

    def save(folder: Path, first: bool = True) -> str:
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=32,
            d_ff=128,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.1,
            feed_forward_proj="relu" if first else "gated-gelu",
            tie_word_embeddings=first,
            eos_token_id=0,
            pad_token_id=1,
            decoder_start_token_id=1,
        )
        model = T5ForConditionalGeneration(config)
        if not first:
            # `transformers` ties what it makes, and unties what it reads.
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 64) * 0.1)
        model.save_pretrained(folder)
        characters = character_tokenizer().backend_tokenizer
        characters.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
        )
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def tiny_t5(save_tiny_t5: SaveT5, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first T5, tiny, as a folder in Hugging Face format."""
    return save_tiny_t5(tmp_path_factory.mktemp("tiny-t5"))
