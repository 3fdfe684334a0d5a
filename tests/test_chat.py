"""A conversation with a run's base and its tuned model in the terminal."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_export import run_with_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from detox_ray.chat import Chat
from detox_ray.cli import app
from detox_ray.config import Config
from detox_ray.config_file import dump_config
from detox_ray.errors import ConfigError
from detox_ray.run_folder import RunFolder
from detox_ray.sft_config import SFTConfig

pytestmark = pytest.mark.unit


def chat_with(run: Path, temperature: float = 1.0, top_p: float = 1.0, **data: str) -> Chat:
    folder = RunFolder.existing(run)
    config = folder.read_config(Config)
    update = {
        "data": config.data.model_copy(update=data),
        "rollout": config.rollout.model_copy(update={"max_new_tokens": 6, "temperature": temperature, "top_p": top_p}),
    }
    return Chat(folder, config.model_copy(update=update))


def said(chat: Chat, text: str) -> list[str]:
    *_, answers = chat.say(text, seed=0)
    return answers


def test_each_system_goes_on_with_its_own_dialogue(tiny_model: str, tmp_path: Path) -> None:
    run_with_adapter(tmp_path / "run", tiny_model, "none")
    chat = chat_with(tmp_path / "run", template="Q{prompt}A", turn_separator=";")
    first = said(chat, "hello")
    assert len(first) == 2
    assert first[0] != first[1]
    assert [speaker.turns for speaker in chat.speakers] == [["hello", first[0]], ["hello", first[1]]]
    again = chat_with(tmp_path / "run", template="Q{prompt}A", turn_separator=";")
    assert said(again, "hello") == first
    second = said(chat, "and now")
    assert [speaker.turns for speaker in chat.speakers] == [
        ["hello", answer, "and now", after] for answer, after in zip(first, second, strict=True)
    ]


def test_plain_prompts_are_answered_one_by_one_as_peft_would(tiny_model: str, tmp_path: Path) -> None:
    run_with_adapter(tmp_path / "run", tiny_model, "none")
    chat = chat_with(tmp_path / "run", temperature=1e-4)
    said(chat, "something else")
    found = said(chat, "hello")
    assert said(chat_with(tmp_path / "run", top_p=1e-6), "hello") == found
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = torch.tensor([[0, *tokenizer("hello", add_special_tokens=False)["input_ids"]]])
    base, other = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    expected = []
    for model in (base, PeftModel.from_pretrained(other, tmp_path / "run" / "adapter")):
        answer = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        expected.append(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert found == expected


def test_the_command_answers_until_an_empty_line(tiny_model: str, tmp_path: Path) -> None:
    run_with_adapter(tmp_path / "run", tiny_model, "none")
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "run")], input="hello\n\nnever read\n")
    assert result.exit_code == 0, result.output
    assert "Base" in result.output
    assert "RLAF" in result.output


def test_a_fine_tuning_is_talked_to_as_it_was_taught(tiny_model: str, tmp_path: Path) -> None:
    run_with_adapter(tmp_path / "run", tiny_model, "none")
    policy = {"model": tiny_model, "quantization": "none", "lora": {"rank": 4}}
    tuning = SFTConfig.model_validate({"policy": policy, "data": {"template": "Q{prompt}A"}})
    (tmp_path / "run" / "config.yaml").write_text(dump_config(tuning))
    chat = Chat(RunFolder.existing(tmp_path / "run"), tuning)
    assert [speaker.name for speaker in chat.speakers] == ["Base", "Fine-tuned"]
    answers = said(chat, "hello")
    assert answers[0] != answers[1]
    assert chat.speakers[1].turns == ["hello", answers[1]]


def test_what_is_refused(tiny_model: str, tmp_path: Path) -> None:
    run_with_adapter(tmp_path / "run", tiny_model, "none")
    with pytest.raises(ConfigError, match="the text has more than 506 tokens; shorten it"):
        said(chat_with(tmp_path / "run"), "x" * 600)
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "nothing")])
    assert isinstance(result.exception, ConfigError)
