"""From the turns of a dialogue to the text and tokens that a model continues, and from a response to what it learns.

Training, rollouts and evaluation all write prompts here, so that a model is asked as it was taught.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from detox_ray.config import PLACE_OF_PROMPT
from detox_ray.errors import ConfigError, ModelError, one_line

PLAIN_TEMPLATE = f"Human: {PLACE_OF_PROMPT}\nAssistant: "


@dataclass(frozen=True)
class WrittenPrompt:
    """A prompt as the model reads it: `token_ids` are those of `text` with `start_ids` before and `stop_ids` behind."""

    text: str
    token_ids: tuple[int, ...]


class DialogueTemplate:
    """Writes turns, which alternate between a person and the model, the person's last; and the response to them.

    A template that is a text stands around each of the person's turns and is followed by the answer. A space at its end
    is tokenised with the answer's first word, as in running text, and is no part of the prompt. Where an encoder reads
    the prompt, the answer is a text of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, turn_separator: str) -> None:
        """`template` is auto, chat, none, or a text with {prompt}.

        Raises:
            ConfigError: it is chat, and the tokenizer has no chat template.
        """
        self._tokenizer = tokenizer
        self._separator = turn_separator
        self._start = start_ids(tokenizer)
        self._stop = stop_ids(tokenizer)
        has_chat = bool(tokenizer.chat_template)
        if template == "chat" and not has_chat:
            raise ConfigError(
                f"data.template=chat: the tokenizer of {tokenizer.name_or_path} has no chat template; write one, such "
                f"as data.template: {json.dumps(PLAIN_TEMPLATE)}"
            )
        self._is_chat = template == "chat" or (template == "auto" and has_chat)
        text = {"auto": PLAIN_TEMPLATE, "none": PLACE_OF_PROMPT}.get(template, template)
        self._text = text.rstrip(" ")
        self._answer_space = text[len(self._text) :]

    def __str__(self) -> str:
        return "the tokenizer's chat template" if self._is_chat else repr(self._text + self._answer_space)

    def prompt(self, turns: Sequence[str]) -> WrittenPrompt:
        """What the model continues with its answer to the last of `turns` (an odd number)."""
        if not self._is_chat:
            text = self._plain_text(turns)
            return WrittenPrompt(text, (*self._start, *self._ids(text), *self._stop))
        # The template writes the start token itself, or wants none.
        text = self._chat_text(turns)
        shown = text.removeprefix(str(self._tokenizer.bos_token)) if self._start else text
        return WrittenPrompt(shown, (*self._ids(text), *self._stop))

    def fitting_prompt(self, turns: Sequence[str], max_tokens: int, trim: bool) -> WrittenPrompt | None:
        """The prompt in at most `max_tokens` tokens, with `trim` without the earliest turns; None where that fails."""
        written = self.prompt(turns)
        while len(written.token_ids) > max_tokens and trim and len(turns) > 1:
            turns = turns[2:]
            written = self.prompt(turns)
        return written if len(written.token_ids) <= max_tokens else None

    def response_ids(self, turns: Sequence[str], response: str, end_ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens of the answer to `turns`, up to and with the first of `end_ids` (at least one) that is among them.

        Where the template writes none behind the answer, the tokenizer's end token is.

        Raises:
            ModelError: the chat template writes an answer elsewhere than where it asks for one.
        """
        if self._stop:
            prompt, written = "", response
        elif self._is_chat:
            prompt, written = self._chat_text(turns), self._chat_answer(turns, response)
        else:
            prompt, written = self._plain_text(turns), self._answer_space + response
        prompt_ids, together = self._ids(prompt), self._ids(prompt + written)
        clean = together[: len(prompt_ids)] == prompt_ids
        # Where the answer would merge with the prompt's last token, sampling begins behind it all the same.
        ids = together[len(prompt_ids) :] if clean else self._ids(written)
        ends = [position for position, token in enumerate(ids) if token in end_ids]
        return tuple(ids[: ends[0] + 1]) if ends else (*ids, self._end_id(end_ids))

    def _plain_text(self, turns: Sequence[str]) -> str:
        asked = [self._text.replace(PLACE_OF_PROMPT, turn) for turn in turns[::2]]
        answers = [self._answer_space + turn + self._separator for turn in turns[1::2]]
        return "".join(part for pair in zip(asked, [*answers, ""], strict=True) for part in pair)

    def _chat_text(self, turns: Sequence[str], response: str | None = None) -> str:
        spoken = [*turns] if response is None else [*turns, response]
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(spoken)]
        try:
            return str(
                self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None)
            )
        except Exception as error:  # a template is code of others, and can fail in any way
            raise ModelError(
                f"the tokenizer's chat template fails ({one_line(error)}); "
                f"write another, such as data.template: {json.dumps(PLAIN_TEMPLATE)}"
            ) from None

    def _chat_answer(self, turns: Sequence[str], response: str) -> str:
        """What the template writes behind the prompt that it opens for the model."""
        prompt, whole = self._chat_text(turns), self._chat_text(turns, response)
        if not whole.startswith(prompt):
            raise ModelError(
                "the tokenizer's chat template writes an answer elsewhere than where it asks for one; "
                f"write another, such as data.template: {json.dumps(PLAIN_TEMPLATE)}"
            )
        return whole[len(prompt) :]

    def _end_id(self, end_ids: Sequence[int]) -> int:
        own = self._tokenizer.eos_token_id
        return int(own) if own is not None else end_ids[0]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What begins a document: the bos token, or nothing.

    It is prepended when the tokenizer itself would prepend it, and when it is the end token as well: models such as
    GPT-2 and Pythia saw it between documents, though their tokenizers do not add it.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return ()
    if bos == tokenizer.eos_token_id or tokenizer("a")["input_ids"][:1] == [bos]:
        return (bos,)
    return ()


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What ends a prompt: the end token where the tokenizer itself writes it, as those of encoder-decoders do."""
    end = tokenizer.eos_token_id
    return (end,) if end is not None and tokenizer("a")["input_ids"][-1:] == [end] else ()


def frame_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a prompt that are none of its text: those of `start_ids` and `stop_ids`."""
    return len(start_ids(tokenizer)) + len(stop_ids(tokenizer))
