"""Which text a classifier reads, and the sentences of one."""

import re

from detox_ray.config import RewardConfig
from detox_ray.errors import RewardError

# The end of a sentence with its closing quotes and brackets, or of a line. A run of stops is tried from its first one
# alone: from each of them, a long run would take time that grows with its square.
SENTENCE_END = re.compile(
    r"(?<![.!?\u2026\u3002\uff01\uff1f])[.!?\u2026\u3002\uff01\uff1f]+[\"'\u2019\u201d)\]]*(?=\s|$)"
    r"|[\u3002\uff01\uff1f]+|\n+"
)

Span = tuple[int, int]


def texts_to_read(texts: list[str], prompts: list[str] | None, config: RewardConfig) -> list[str]:
    """What the classifiers read: the responses, or each prompt with its response.

    Raises:
        RewardError: the configuration wants prompts and there are none, or not as many as responses.
    """
    if config.text == "response":
        return texts
    if prompts is None or len(prompts) != len(texts):
        raise RewardError(
            f"reward.text=prompt_and_response needs a prompt for each of the {len(texts)} responses, "
            f"got {'none' if prompts is None else len(prompts)}"
        )
    return [joined(prompt, response) for prompt, response in zip(prompts, texts, strict=True)]


def joined(prompt: str, response: str) -> str:
    """Prompt and response as one text; a decoded response has often lost the space it began with."""
    glued = prompt and response and not prompt[-1].isspace() and response[0].isalnum()
    return f"{prompt} {response}" if glued else prompt + response


def sentence_spans(text: str, most: int) -> list[Span]:
    """Where the sentences of `text` begin and end (exclusive), in characters, without the white space around them.

    More than `most >= 1` sentences are merged, neighbours first, into at most that many spans; a text of white space
    alone is one span.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    spans = []
    for begin, end in zip([0, *ends], [*ends, len(text)], strict=True):
        sentence = text[begin:end]
        if kept := sentence.strip():
            start = begin + sentence.index(kept[0])
            spans.append((start, start + len(kept)))
    if not spans:
        return [(0, len(text))]
    size = -(-len(spans) // most)
    groups = [spans[i : i + size] for i in range(0, len(spans), size)]
    return [(group[0][0], group[-1][1]) for group in groups]


def utf16_offsets(text: str, spans: list[Span]) -> list[Span]:
    """The spans in UTF-16 code units, which Perspective counts in; `spans` do not overlap and rise."""
    converted, position, units = [], 0, 0
    for begin, end in spans:
        units += _utf16_length(text[position:begin])
        first = units
        units += _utf16_length(text[begin:end])
        converted.append((first, units))
        position = end
    return converted


def _utf16_length(text: str) -> int:
    return len(text) + sum(character > "\uffff" for character in text)
