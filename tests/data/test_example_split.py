"""What is trained on and what is not, decoded, for every format; and who is kept apart from whom."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from detox_ray.config import DataConfig
from detox_ray.data.example_split import ExampleSplit, dev_prompts, load_examples
from detox_ray.data.prompts import load_all_prompts, load_prompts
from detox_ray.errors import DataError
from detox_ray.records import TokenizedExample
from detox_ray.sft_config import ExampleConfig

pytestmark = pytest.mark.unit
TEMPLATE = '<human>: "{prompt}"\n<bot>: '
# format -> (prompt as written, response) of every example
LEARNED = {
    "dialoconan": {
        ('<human>: "You people are fools."\n<bot>:', " Nobody here is a fool."),
        (
            '<human>: "You people are fools."\n<bot>: Nobody here is a fool.\n'
            '<human>: "All of you, silly fools!"\n<bot>:',
            " We would rather talk than call names.",
        ),
        ('<human>: "Go away, you clowns."\n<bot>:', " We are all neighbours here."),
        ('<human>: "What a bunch of idiots."\n<bot>:', " That is unkind to hear."),
        ('<human>: "Stupid, all of them."\n<bot>:', " They are as clever as anyone."),
    },
    "multitarget_conan": {
        ('<human>: "You fools."\n<bot>:', " Nobody is a fool."),
        ('<human>: "You fools."\n<bot>:', " That is unkind."),
    },
    "dialogsum": {('<human>: "#Person1#: Hello.\n#Person2#: Hi."\n<bot>:', " They greet each other.")},
    "paradetox": {
        ('<human>: "you damn fool"\n<bot>:', " you are mistaken"),
        ('<human>: "you damn fool"\n<bot>:', " you are wrong"),
        ('<human>: "shut up"\n<bot>:', " please be quiet"),
    },
    "pairs": {('<human>: "The weather is"\n<bot>:', "  fine today.")},
}


def load(
    source: Path, tokenizer: PreTrainedTokenizerFast, other: Path | None = None, seed: int = 0, **options
) -> ExampleSplit:
    config = ExampleConfig(**{"source": str(source), "template": TEMPLATE, "dev_examples": 1, **options})
    if other is not None:
        config = config.model_copy(update={"dev_source": str(other)})
    return load_examples(config, tokenizer, [tokenizer.eos_token_id], seed)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A file of one pair, so that all of another can be trained on."""
    path = tmp_path / "elsewhere.csv"
    path.write_text("prompt,response\nHow late is it?,Ten.\n")
    return path


def read_back(example: TokenizedExample, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """(what is read, what is learned) as text, without the start and the end token that must be there."""
    assert example.prompt_ids[0] == tokenizer.bos_token_id
    assert example.response_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in [*example.prompt_ids[1:], *example.response_ids[:-1]]
    return tokenizer.decode(example.prompt_ids[1:]), tokenizer.decode(example.response_ids[:-1])


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_of_every_format(
    name: str, published: dict[str, Path], elsewhere: Path, merging_tokenizer: PreTrainedTokenizerFast
) -> None:
    split = load(published[name], merging_tokenizer, other=elsewhere)
    assert split.format == name
    assert {read_back(example, merging_tokenizer) for example in split.train} == LEARNED[name]


def test_the_chat_template_serves_too(published: dict[str, Path], chat_tokenizer: PreTrainedTokenizerFast) -> None:
    split = load(published["dialoconan"], chat_tokenizer, template="auto")
    assert split.template == "the tokenizer's chat template"
    texts = {chat_tokenizer.decode([*e.prompt_ids, *e.response_ids]) for e in split.train + split.dev}
    assert (
        "<|im_start|>user\nWhat a bunch of idiots.<|im_end|>\n<|im_start|>assistant\n"
        f"That is unkind to hear.<|im_end|>\n{chat_tokenizer.eos_token}"
    ) in texts


def test_no_dialogue_is_in_both_parts(tmp_path: Path, merging_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "many.csv"
    rows = ["text,dialogue_id,turn_id,type"]
    for dialogue in range(40):
        # Pairs of dialogues begin alike but for case and spaces.
        rows += [f"You {'FOOL' if dialogue % 2 else 'fool '} {dialogue // 2},{dialogue},0,HS"]
        rows += [f"turn {t} of {dialogue},{dialogue},{t},{'HS' if t % 2 == 0 else 'CN'}" for t in range(1, 6)]
    path.write_text("\n".join(rows) + "\n")
    split = load(path, merging_tokenizer, dev_examples=31, max_tokens=512)

    def firsts(examples: list[TokenizedExample]) -> set[str]:
        return {
            read_back(e, merging_tokenizer)[0].partition('"\n')[0].lower().replace("  ", " ").strip() for e in examples
        }

    assert len(split.dev) == 31
    assert not firsts(split.train) & firsts(split.dev)
    # Seven whole groups of two dialogues of three answers: the first prompts of the two count as one.
    assert len(split.train) == 40 * 3 - 42
    again = load(path, merging_tokenizer, dev_examples=31, max_tokens=512)
    assert [e.prompt_ids.tolist() for e in again.dev] == [e.prompt_ids.tolist() for e in split.dev]
    other = load(path, merging_tokenizer, dev_examples=31, max_tokens=512, seed=1)
    assert firsts(other.dev) != firsts(split.dev)

    # What a detoxification run on the same dialogues and seed holds out was not trained on here.
    config = DataConfig(source=str(path), format="dialoconan", template=TEMPLATE, max_tokens=511, heldout_prompts=25)
    prompts = load_prompts(config, merging_tokenizer, 0)
    dev = {tuple(e.prompt_ids) for e in split.dev}
    assert {p.token_ids for p in prompts.heldout} <= dev
    heldout = {p.text.partition('"\n')[0].lower().replace("  ", " ").strip() for p in prompts.heldout}
    trained = {p.text.partition('"\n')[0].lower().replace("  ", " ").strip() for p in prompts.train}
    assert not heldout & trained


def test_prompts_of_a_detoxification_run_are_those_that_were_fine_tuned_on(
    published: dict[str, Path], merging_tokenizer: PreTrainedTokenizerFast
) -> None:
    for name in set(LEARNED) - {"pairs"}:
        config = DataConfig(source=str(published[name]), format=name, template=TEMPLATE)
        found = load_all_prompts(config, merging_tokenizer, seed=0).heldout
        assert {p.text for p in found} == {prompt for prompt, _ in LEARNED[name]}
        for prompt in found:
            assert list(prompt.token_ids) == [0, *merging_tokenizer(prompt.text)["input_ids"]]
    config = DataConfig(source=str(published["pairs"]), template=TEMPLATE)
    assert {p.text for p in load_all_prompts(config, merging_tokenizer, seed=0).heldout} == {
        '<human>: "The weather is"\n<bot>:'
    }


def test_dialogue_prompts_too_long(published: dict[str, Path], merging_tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(source=str(published["dialoconan"]), format="dialoconan", template=TEMPLATE)
    by_length = sorted(load_all_prompts(config, merging_tokenizer, 0).heldout, key=lambda p: len(p.token_ids))
    limit = len(by_length[-1].token_ids) - 2  # one less than the longest has without its start token
    trimmed = load_all_prompts(config.model_copy(update={"max_tokens": limit}), merging_tokenizer, 0)
    assert {'<human>: "All of you, silly fools!"\n<bot>:'} == (
        {p.text for p in trimmed.heldout} - {p.text for p in by_length}
    )
    dropped = load_all_prompts(
        config.model_copy(update={"max_tokens": limit, "too_long": "drop"}), merging_tokenizer, 0
    )
    assert {p.text for p in dropped.heldout} == {p.text for p in by_length[:-1]}
    assert dropped.skipped["too long"] == 1


def test_examples_that_do_not_fit_lose_their_earliest_turns_or_are_counted(
    published: dict[str, Path], elsewhere: Path, merging_tokenizer: PreTrainedTokenizerFast
) -> None:
    everything = load(published["dialoconan"], merging_tokenizer, other=elsewhere).train
    longest = max(len(e) for e in everything)
    trimmed = load(published["dialoconan"], merging_tokenizer, other=elsewhere, max_tokens=longest - 1)
    assert trimmed.noted == {"without the earliest turns, to fit data.max_tokens": 1}
    texts = {read_back(e, merging_tokenizer) for e in trimmed.train}
    assert ('<human>: "All of you, silly fools!"\n<bot>:', " We would rather talk than call names.") in texts
    assert len(texts & LEARNED["dialoconan"]) == len(texts) - 1 == 4
    options = {"max_tokens": longest - 1, "too_long": "drop"}
    dropped = load(published["dialoconan"], merging_tokenizer, other=elsewhere, **options)
    assert len(dropped.train) == 4
    assert dropped.left_out["longer than data.max_tokens"] == 1
    with pytest.raises(DataError, match=r"0 examples to train on .*response longer than data\.max_tokens.* raise data"):
        load(published["dialoconan"], merging_tokenizer, max_tokens=3)


def test_dev_examples_of_a_file_of_their_own_are_not_trained_on(
    published: dict[str, Path], tmp_path: Path, merging_tokenizer: PreTrainedTokenizerFast
) -> None:
    dev = tmp_path / "dev.tsv"
    dev.write_text("toxic\tneutral1\nSHUT  up\tbe quiet please\n")
    split = load(published["paradetox"], merging_tokenizer, other=dev)
    assert [read_back(e, merging_tokenizer)[1] for e in split.dev] == [" be quiet please"]
    assert {read_back(e, merging_tokenizer)[1] for e in split.train} == {" you are mistaken", " you are wrong"}
    assert split.left_out == {"beginning like a dev example": 1}


def test_too_few_examples_are_refused(published: dict[str, Path], merging_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        DataError, match=r"0 examples to train on and 3 for the dev loss .* lower data\.dev_examples=200"
    ):
        load(published["paradetox"], merging_tokenizer, dev_examples=200)


@pytest.mark.parametrize("template", [TEMPLATE, "none"])
@pytest.mark.parametrize("kind", ["merging_tokenizer", "tiny_t5"])
def test_an_evaluation_asks_the_dev_prompts_in_the_very_tokens(
    published: dict[str, Path], tmp_path: Path, template: str, kind: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(kind)
    tokenizer = AutoTokenizer.from_pretrained(found) if kind == "tiny_t5" else found
    split, asked = dev_and_asked(published["dialoconan"], tokenizer, tmp_path, template)
    assert asked == {tuple(e.prompt_ids.tolist()) for e in split.dev}


def test_an_evaluation_begins_with_the_start_token_where_a_chat_template_did_not(
    published: dict[str, Path], tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    split, asked = dev_and_asked(published["dialoconan"], chat_tokenizer, tmp_path, "chat")
    assert asked == {(chat_tokenizer.bos_token_id, *e.prompt_ids.tolist()) for e in split.dev}


def dev_and_asked(
    source: Path, tokenizer: PreTrainedTokenizerFast, folder: Path, template: str
) -> tuple[ExampleSplit, set[tuple[int, ...]]]:
    """The examples, and the tokens of the prompts that an evaluation of the run asks."""
    split = load(source, tokenizer, dev_examples=3, template=template, max_tokens=400)
    (folder / "dev.jsonl").write_text(dev_prompts(split, tokenizer))
    data = DataConfig(source=str(folder / "dev.jsonl"), max_tokens=400)
    return split, {prompt.token_ids for prompt in load_all_prompts(data, tokenizer, seed=0).heldout}
