import pytest

from detox_ray.errors import ConfigError
from detox_ray.serving.playground.request import AnswerRequest, answer_request, from_permalink, to_permalink

pytestmark = pytest.mark.unit
REQUEST = AnswerRequest(
    prompt='Tom: 50% & more?\nNora: "é" + <b> #1 ', temperature=0.7, top_p=0.95, max_new_tokens=32, seed=2**31 - 1
)


def test_a_permalink_is_the_request() -> None:
    link = to_permalink(REQUEST)
    assert not set(link) & set("# \n<\"'")
    assert from_permalink(link) == from_permalink(f"#{link}") == REQUEST


def test_an_address_without_permalink() -> None:
    assert from_permalink("") is None
    assert from_permalink("#") is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"temperature": "9"}, "temperature = '9'"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p = 0"),
        ({"seed": 2**31}, "seed = 2147483648"),
        ({"max_new_tokens": 1.5}, "max_new_tokens = 1.5"),
        ({"max_new_tokens": 257}, "max_new_tokens = 257"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": None}, "prompt = None"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_what_is_out_of_bounds_is_named(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        answer_request(**{**REQUEST.model_dump(), **changed})
    assert said in str(error.value)


def test_a_long_prompt_is_refused_without_quoting_it() -> None:
    with pytest.raises(ConfigError, match="the prompt has 2001 characters and may have 2000") as error:
        answer_request(**{**REQUEST.model_dump(), "prompt": "fool " * 400 + "!"})
    assert "fool" not in str(error.value)


def test_a_link_that_is_cut_off_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="seed is missing"):
        from_permalink(to_permalink(REQUEST).partition("&seed")[0])
