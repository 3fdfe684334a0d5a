"""Examples to learn from: turns of a dialogue and the response to them, from the published files or any file of pairs.

Nothing is dropped in silence: a row that cannot be used is left out and counted with its reason. The texts of published
files are stripped of white space around them; those of a file of pairs are kept as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from detox_ray.config import DialogueFormat
from detox_ray.data.tables import Row, Tally, left_out_text, read_rows, require_columns
from detox_ray.errors import DataError

HATE_SPEECH, COUNTER_NARRATIVE = "HS", "CN"


@dataclass(frozen=True)
class Example:
    """`turns` alternate between a person and the model, the person's last; `response` is what the model is to say.

    `meta` holds the other columns of the row with the last turn.
    """

    turns: tuple[str, ...]
    response: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class ExampleFile:
    """What `read_examples` found, in the order of the file; `left_out` counts by reason what is no example."""

    examples: list[Example]
    format: DialogueFormat
    left_out: dict[str, int]


class Columns(NamedTuple):
    """Of a row that is a whole example; the responses after the first may be missing or empty."""

    prompt: str
    responses: tuple[str, ...]


# The columns of the published files. DialogSum's test split has three references instead of one summary.
PAIRS: dict[DialogueFormat, list[Columns]] = {
    "multitarget_conan": [Columns("HATE_SPEECH", ("COUNTER_NARRATIVE",))],
    "dialogsum": [Columns("dialogue", ("summary",)), Columns("dialogue", ("summary1", "summary2", "summary3"))],
    "paradetox": [Columns("toxic", ("neutral1", "neutral2", "neutral3"))],
}
DIALOGUE_COLUMNS = ("text", "dialogue_id", "turn_id", "type")


def read_examples(
    path: str | Path,
    format: DialogueFormat | None = None,
    prompt_column: str = "prompt",
    response_column: str = "response",
) -> ExampleFile:
    """The examples in a JSONL, CSV, TSV or Parquet file, each once.

    Args:
        path: of the file.
        format: none: told by the columns.
        prompt_column: when the format is pairs.
        response_column: likewise.

    Raises:
        DataError: the file or a column is missing, or nothing in it can be used.
    """
    path, tally = Path(path).expanduser(), Tally()
    rows = list(read_rows(path, tally))
    if not rows:
        raise DataError(f"{path} has no rows{left_out_text(tally.counts())}; give a file of dialogues or pairs")
    present = list(dict.fromkeys(name for _, row in rows for name in row))
    found = format or _format_of(present, (prompt_column, response_column))
    if found == "dialoconan":
        require_columns(path, DIALOGUE_COLUMNS, present)
        examples = _dialogue_examples(rows, tally)
    else:
        pairs = [Columns(prompt_column, (response_column,))] if found == "pairs" else PAIRS[found]
        columns = next((c for c in pairs if c.responses[0] in present), pairs[0])
        require_columns(path, (columns.prompt, columns.responses[0]), present)
        examples = _pair_examples(rows, columns, tally, strip=found != "pairs")
    unique = _unique(examples, tally)
    if not unique:
        raise DataError(f"{path}: no example is left{left_out_text(tally.counts())}; repair the file")
    return ExampleFile(unique, found, tally.counts())


def _format_of(present: Sequence[str], named: tuple[str, str]) -> DialogueFormat:
    """Pairs where the columns named for them are there, else the published format that has these columns."""
    if set(DIALOGUE_COLUMNS) <= set(present):
        return "dialoconan"
    for name, kinds in PAIRS.items():
        if not set(named) <= set(present) and any({c.prompt, c.responses[0]} <= set(present) for c in kinds):
            return name
    return "pairs"


def _pair_examples(
    rows: list[tuple[str, Row]], columns: Columns, tally: Tally, strip: bool
) -> Iterator[tuple[str, Example]]:
    """(place, example) of every prompt and response; of several responses to a prompt, each is an example."""
    for place, row in rows:
        if any(isinstance(row.get(name), list | bool) for name in (columns.prompt, *columns.responses)):
            tally.add("prompt or response that is not text", place)
            continue
        prompt = _text(row, columns.prompt)
        responses = [_text(row, name) for name in columns.responses]
        if not prompt.strip() or not responses[0].strip():
            tally.add("empty response" if prompt.strip() else "empty prompt", place)
            continue
        meta = {name: value for name, value in row.items() if name not in (columns.prompt, *columns.responses)}
        for response in responses:
            if response.strip():
                turns, answer = ((prompt.strip(),), response.strip()) if strip else ((prompt,), response)
                yield place, Example(turns, answer, meta)


def _dialogue_examples(rows: list[tuple[str, Row]], tally: Tally) -> Iterator[tuple[str, Example]]:
    """(place, example) of every hate speech that a counter-narrative follows, with all the turns before it.

    A dialogue is used up to where it breaks: a turn without text or number, or two turns of one type in a row.
    """
    dialogues: dict[str, list[tuple[str, Row]]] = {}
    for place, row in rows:
        if name := _text(row, "dialogue_id").strip():
            dialogues.setdefault(name, []).append((place, row))
        else:
            tally.add("turn without a dialogue_id", place)
    for turns in dialogues.values():
        yield from _one_dialogue(_in_order(turns, tally), tally)


def _in_order(turns: list[tuple[str, Row]], tally: Tally) -> list[tuple[str, Row]]:
    """The turns by their number, up to the first gap or repetition; none where a number is no number."""
    try:
        numbered = sorted((_whole_number(row.get("turn_id")), place, row) for place, row in turns)
    except (TypeError, ValueError, OverflowError):
        tally.add("dialogue with a turn_id that is no whole number", turns[0][0])
        return []
    first = numbered[0][0]
    for position, (number, place, _) in enumerate(numbered):
        if number != first + position or first > 1:
            tally.add("dialogue with a missing or repeated turn, used up to there", place)
            numbered = numbered[:position]
            break
    return [(place, row) for _, place, row in numbered]


def _one_dialogue(turns: list[tuple[str, Row]], tally: Tally) -> Iterator[tuple[str, Example]]:
    said: list[str] = []
    asked: Row = {}
    place = ""
    for place, row in turns:
        text, kind = _text(row, "text").strip(), _text(row, "type").strip()
        if not text:
            tally.add("dialogue with an empty turn, used up to there", place)
            return
        if kind != (HATE_SPEECH, COUNTER_NARRATIVE)[len(said) % 2]:
            tally.add("dialogue whose turns do not alternate, used up to there", place)
            return
        if kind == HATE_SPEECH:
            asked = row
        else:
            meta = {name: value for name, value in asked.items() if name not in ("text", "type")}
            yield place, Example(tuple(said), text, meta)
        said.append(text)
    if len(said) % 2:
        tally.add("dialogue that ends without an answer, used up to there", place)


def _unique(examples: Iterator[tuple[str, Example]], tally: Tally) -> list[Example]:
    unique: dict[tuple[tuple[str, ...], str], Example] = {}
    for place, example in examples:
        key = (example.turns, example.response)
        if key in unique:
            tally.add("duplicate", place)
        else:
            unique[key] = example
    return list(unique.values())


def _whole_number(value: Any) -> int:
    """Of 3, "3" and "3.0"; errors as `float` and `int`."""
    number = float(value)
    if number != int(number):
        raise ValueError(value)
    return int(number)


def _text(row: Row, name: str) -> str:
    """The text in a column; empty where there is none (None, or the NaN that some writers put for it)."""
    value = row.get(name)
    return "" if value is None or value != value else str(value)
