"""A tokenizer with merges, with and without a chat template, and a small file in each published format."""

import csv
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from detox_ray.data.lab_models import train_tokenizer

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content }}<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DIALOGUES = [
    # dialogue, turn, type, text
    ("1", 0, "HS", "You people are fools."),
    ("1", 1, "CN", "Nobody here is a fool."),
    ("1", 2, "HS", "All of you, silly fools!"),
    ("1", 3, "CN", "We would rather talk than call names."),
    ("2", 0, "HS", "Go away, you clowns."),
    ("2", 1, "CN", "We are all neighbours here."),
    ("2", 2, "HS", "Clowns, I said."),
    ("3", 1, "CN", "That is unkind to hear."),  # the rows of a dialogue in any order
    ("3", 0, "HS", "What a bunch of idiots."),
    ("4", 0, "HS", "Lazy fools, the lot."),
    ("4", 1, "HS", "Lazy, lazy fools."),
    ("4", 2, "CN", "They work as hard as you do."),
    ("5", 0, "HS", "Silly geese."),
    ("5", 1, "CN", "  "),
    ("6", 0, "HS", "Stupid, all of them."),
    ("6", 1, "CN", "They are as clever as anyone."),
    ("6", 3, "CN", "You would like them if you met them."),
]


@pytest.fixture(scope="session")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which a word and the space before it are one token; its end token begins documents too."""
    words = " ".join(text for *_, text in DIALOGUES) + " Human: Assistant: Summary: <bot>: Rewritten:"
    return train_tokenizer([f"{words}\n"] * 4, vocab_size=600)


@pytest.fixture(scope="session")
def chat_tokenizer(merging_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory):
    """The same with ChatML, whose end of a turn is not the end token."""
    folder = tmp_path_factory.mktemp("chat-tokenizer")
    merging_tokenizer.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def published(tmp_path: Path) -> dict[str, Path]:
    """A file in each format, as it is published, by the name of the format."""
    return {
        "dialoconan": write_csv(
            tmp_path / "dialogues.csv",
            [
                {"text": text, "TARGET": "OTHER", "dialogue_id": d, "turn_id": n, "type": kind, "source": "session_1"}
                for d, n, kind, text in DIALOGUES
            ],
        ),
        "multitarget_conan": write_csv(
            tmp_path / "pairs.csv",
            [
                {
                    "INDEX": 0,
                    "HATE_SPEECH": "You fools.",
                    "COUNTER_NARRATIVE": " Nobody is a fool. ",
                    "TARGET": "OTHER",
                },
                {"INDEX": 1, "HATE_SPEECH": "You fools.", "COUNTER_NARRATIVE": "That is unkind.", "TARGET": "OTHER"},
                {"INDEX": 2, "HATE_SPEECH": "Silly lot.", "COUNTER_NARRATIVE": " ", "TARGET": "OTHER"},
            ],
        ),
        "dialogsum": write_jsonl(
            tmp_path / "train.jsonl",
            [
                {
                    "fname": "train_0",
                    "dialogue": "#Person1#: Hello.\n#Person2#: Hi.",
                    "summary": "They greet each other. ",
                },
                {"fname": "train_1", "dialogue": "", "summary": "Nothing is said."},
            ],
        ),
        "paradetox": write_csv(
            tmp_path / "pairs.tsv",
            [
                {"toxic": "you damn fool", "neutral1": "you are mistaken", "neutral2": "you are wrong", "neutral3": ""},
                {"toxic": "shut up", "neutral1": "please be quiet", "neutral2": "", "neutral3": ""},
            ],
            delimiter="\t",
        ),
        "pairs": write_jsonl(
            tmp_path / "any.jsonl",
            [
                {"prompt": "The weather is", "response": " fine today."},
                {"prompt": "The weather is", "response": None},
                {"prompt": "", "response": "Nothing was asked."},
            ],
        ),
    }


def write_csv(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
