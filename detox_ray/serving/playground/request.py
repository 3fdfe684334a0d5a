"""What the page asks the engine, and the permalink that asks it again."""

from typing import Any
from urllib.parse import parse_qsl, urlencode

from pydantic import Field, field_validator

from detox_ray.config_file import parse_section
from detox_ray.config_section import Section
from detox_ray.errors import ConfigError

LONGEST_PROMPT_CHARACTERS = 2000
LONGEST_ANSWER_TOKENS = 256
LARGEST_SEED = 2**31 - 1


class AnswerRequest(Section):
    """A prompt and how it is answered; equal requests get equal answers."""

    prompt: str = Field(max_length=LONGEST_PROMPT_CHARACTERS, description="text to continue")
    temperature: float = Field(ge=0, le=2, description="0: the likeliest token, always")
    top_p: float = Field(gt=0, le=1, description="nucleus")
    max_new_tokens: int = Field(ge=1, le=LONGEST_ANSWER_TOKENS, description="longest answer")
    seed: int = Field(ge=0, le=LARGEST_SEED, description="of the random numbers that all models share")

    @field_validator("prompt")
    @classmethod
    def _is_not_empty(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty; type or pick one")
        return prompt


def answer_request(**values: Any) -> AnswerRequest:
    """The request of these values.

    Raises:
        ConfigError: one is missing, of another type, or out of bounds.
    """
    if isinstance(values.get("prompt"), str) and len(values["prompt"]) > LONGEST_PROMPT_CHARACTERS:
        # pydantic's own message would quote it.
        raise ConfigError(
            f"the prompt has {len(values['prompt'])} characters and may have {LONGEST_PROMPT_CHARACTERS}; shorten it"
        )
    return parse_section(AnswerRequest, values)


def to_permalink(request: AnswerRequest) -> str:
    """The fragment of an address that stands for the request, without its `#`.

    A browser keeps a fragment to itself, so that no server or proxy writes the prompt to its log.
    """
    return urlencode(request.model_dump())


def from_permalink(fragment: str) -> AnswerRequest | None:
    """The request of a permalink's fragment, with or without `#`; None when the address has none.

    Raises:
        ConfigError: it is none that `to_permalink` made.
    """
    values = dict(parse_qsl(fragment.removeprefix("#"), keep_blank_values=True))
    return answer_request(**values) if values else None
