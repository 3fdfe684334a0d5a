"""What is written around turns, and that its tokens are those of constructions made without our code."""

import copy

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from detox_ray.config import DataConfig
from detox_ray.data.templates import PLAIN_TEMPLATE, DialogueTemplate
from detox_ray.errors import ConfigError, ModelError
from detox_ray.sft_config import ExampleConfig

pytestmark = pytest.mark.unit
TURNS = ("You people are fools.", "Nobody here is a fool.", "All of you, silly fools!")
ANSWER = "We would rather talk than call names."
REWARDLM = '<human>: "{prompt}"\n<bot>: '


def written(tokenizer: PreTrainedTokenizerFast, template: str, turns: tuple[str, ...] = TURNS, separator: str = "\n"):
    found = DialogueTemplate(tokenizer, template, separator)
    return found.prompt(turns), found.response_ids(turns, ANSWER, [tokenizer.eos_token_id])


def test_rewardlms_template(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, response_ids = written(merging_tokenizer, REWARDLM)
    assert prompt.text == (
        '<human>: "You people are fools."\n<bot>: Nobody here is a fool.\n<human>: "All of you, silly fools!"\n<bot>:'
    )
    end = merging_tokenizer.eos_token_id
    # One text, tokenised at once: no token is split or made twice where prompt and answer meet.
    whole = merging_tokenizer(f"{prompt.text} {ANSWER}")["input_ids"]
    assert [*prompt.token_ids, *response_ids] == [end, *whole, end]
    assert merging_tokenizer.decode(response_ids) == f" {ANSWER}{merging_tokenizer.eos_token}"


def test_an_answer_begins_with_the_token_that_it_has_in_running_text(
    merging_tokenizer: PreTrainedTokenizerFast,
) -> None:
    _, response_ids = written(merging_tokenizer, "{prompt}\n<bot>: ")
    assert merging_tokenizer.decode(response_ids[:1]) == " We"
    _, after_newline = written(merging_tokenizer, "{prompt}\n")
    assert merging_tokenizer.decode(after_newline[:-1]) == ANSWER


def test_an_answer_that_would_merge_with_the_prompt_is_tokenised_behind_it(
    merging_tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = DialogueTemplate(merging_tokenizer, "none", "\n")
    assert len(merging_tokenizer(" are")["input_ids"]) == 1
    prompt = template.prompt([" a"])
    response_ids = template.response_ids([" a"], "re", [0])
    assert merging_tokenizer.decode(prompt.token_ids[1:]) == " a"
    assert merging_tokenizer.decode(response_ids[:-1]) == "re"


def test_the_chat_template_is_transformers_own(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ("chat", "auto"):
        prompt, response_ids = written(chat_tokenizer, name)
        messages = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user", "assistant"), [*TURNS, ANSWER], strict=True)
        ]
        asked = chat_tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
        assert list(prompt.token_ids) == asked["input_ids"]
        whole = chat_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        mask = whole["assistant_masks"]
        assert mask[: len(prompt.token_ids)].count(1) > 0  # the first answer, which is not learned again
        behind = range(len(prompt.token_ids), len(mask))
        learned = [whole["input_ids"][i] for i in behind if mask[i]]
        newline = chat_tokenizer("\n")["input_ids"]
        # The turn's end is no end token here, so the newline behind it and the end token are learned too.
        assert list(response_ids) == [*learned, *newline, chat_tokenizer.eos_token_id]


def test_a_chat_turn_that_ends_with_the_end_token_is_learned_up_to_it(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    template = DialogueTemplate(chat_tokenizer, "chat", "\n")
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    response_ids = template.response_ids(TURNS, ANSWER, [0, end])
    assert chat_tokenizer.decode(response_ids) == f"{ANSWER}<|im_end|>"


def test_a_start_token_that_the_chat_template_writes_is_not_written_twice(
    chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ bos_token }}" + chat_tokenizer.chat_template)
    prompt = DialogueTemplate(chat_tokenizer, "chat", "\n").prompt(TURNS)
    assert prompt.token_ids.count(chat_tokenizer.bos_token_id) == 1
    assert prompt.text.startswith("<|im_start|>")
    # As the evaluation makes tokens of a prompt's text.
    assert prompt.token_ids == (chat_tokenizer.bos_token_id, *chat_tokenizer(prompt.text)["input_ids"])


def test_a_chat_text_keeps_what_looks_like_a_start_token_where_the_tokenizer_adds_none(
    chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detox_ray.data.templates.start_ids", lambda _: ())
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    prompt = DialogueTemplate(tokenizer, "chat", "\n").prompt(TURNS)
    assert prompt.text.startswith("<|im_start|>")
    assert prompt.token_ids == tuple(tokenizer(prompt.text, add_special_tokens=False)["input_ids"])


def test_plain_and_none(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    assert written(merging_tokenizer, "auto")[0] == written(merging_tokenizer, PLAIN_TEMPLATE)[0]
    assert written(merging_tokenizer, "auto")[0].text.endswith("Human: All of you, silly fools!\nAssistant:")
    prompt, response_ids = written(merging_tokenizer, "none", turns=TURNS[:1])
    assert prompt.text == TURNS[0]
    assert merging_tokenizer.decode(response_ids[:-1]) == ANSWER


def test_the_earliest_turns_give_way(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    template = DialogueTemplate(merging_tokenizer, "auto", "\n")
    whole, last = template.prompt(TURNS), template.prompt(TURNS[2:])
    length = len(whole.token_ids)
    assert template.fitting_prompt(TURNS, length, trim=True) == whole
    assert template.fitting_prompt(TURNS, length - 1, trim=True) == last
    assert template.fitting_prompt(TURNS, length - 1, trim=False) is None
    assert template.fitting_prompt(TURNS, 3, trim=True) is None


def test_templates_that_cannot_be_are_refused(
    merging_tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for section in (DataConfig, ExampleConfig):
        with pytest.raises(ValueError, match=r"template 'Human: ' has no \{prompt\}: say where the prompt goes"):
            section(template="Human: ")
        with pytest.raises(ValueError, match="YAML reads a line break in double quotes only"):
            section(template=r"Human: {prompt}\nAssistant: ")
    with pytest.raises(ConfigError, match=r"data\.template=chat: the tokenizer of .* has no chat template"):
        DialogueTemplate(merging_tokenizer, "chat", "\n")
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ raise_exception('no second turn') }}")
    with pytest.raises(ModelError, match="no second turn"):
        DialogueTemplate(chat_tokenizer, "chat", "\n").prompt(TURNS)
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ messages | length }}")
    with pytest.raises(ModelError, match="writes an answer elsewhere"):
        DialogueTemplate(chat_tokenizer, "chat", "\n").response_ids(TURNS, ANSWER, [0])


def test_an_encoder_reads_a_prompt_with_its_end_and_the_answer_is_a_text_of_its_own(tiny_t5: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5)
    template = DialogueTemplate(tokenizer, "Summarize: {prompt}!", "\n")
    prompt = template.prompt(["Two people talk."])
    assert list(prompt.token_ids) == tokenizer("Summarize: Two people talk.!")["input_ids"]
    assert tokenizer.decode(prompt.token_ids) == "Summarize: Two people talk.!<eos>"
    response_ids = template.response_ids(["Two people talk."], "They talk.", [tokenizer.eos_token_id])
    assert list(response_ids) == tokenizer("They talk.")["input_ids"]
    longest = len(prompt.token_ids)
    assert template.fitting_prompt(["Two people talk."], longest, trim=True) == prompt
    assert template.fitting_prompt(["Two people talk."], longest - 1, trim=True) is None
