"""The `openai` package, unmodified."""

from typing import get_args

import httpx
import openai
import pytest

from detox_ray.rewards.classifiers import load_classifier
from detox_ray.serving.api_config import ApiConfig, Category

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("local_ray")]

RUDE, CIVIL = "you are a stupid idiot", "thank you for the kind help"


@pytest.fixture(scope="module")
def client_of_openai(client: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(api_key="any", base_url=f"{client.base_url}/v1", max_retries=0)


def test_a_text(client_of_openai: openai.OpenAI, api_config: ApiConfig) -> None:
    response = client_of_openai.moderations.create(input=RUDE, model="omni-moderation-latest")
    [result] = response.results
    words, tiny = (load_classifier(c, "cpu") for c in api_config.reward.classifiers)
    toxicity = (words.toxicity([RUDE])[0] + tiny.toxicity([RUDE])[0]) / 2
    assert result.category_scores.harassment == pytest.approx(toxicity, abs=1e-5)
    assert result.category_scores.hate == pytest.approx(tiny.read([RUDE]).labels["calm"][0], abs=1e-5)
    assert (result.flagged, result.categories.harassment, result.categories.hate) == (True, True, False)
    assert response.model == "detox_ray:words+tiny"


def test_a_list_and_an_async_client(client_of_openai: openai.OpenAI, client: httpx.Client) -> None:
    import asyncio

    response = client_of_openai.moderations.create(input=[CIVIL, RUDE])
    civil, rude = response.results
    # The civil text is "calm": the test's stand-in for hate, with its own threshold.
    assert (civil.categories.harassment, civil.categories.hate) == (False, True)
    assert rude.categories.harassment

    async def ask() -> bool:
        async with openai.AsyncOpenAI(api_key="any", base_url=f"{client.base_url}/v1") as asking:
            return (await asking.moderations.create(input=RUDE)).results[0].flagged

    assert asyncio.run(ask())


def test_categories_nobody_provides_are_marked_as_not_judged(client_of_openai: openai.OpenAI) -> None:
    raw = client_of_openai.moderations.with_raw_response.create(input=RUDE)
    [result] = raw.parse().results
    missing = set(get_args(Category)) - {"harassment", "hate"}
    assert result.category_applied_input_types.harassment == ["text"]
    assert result.category_applied_input_types.violence == []
    assert (result.categories.violence, result.category_scores.violence) == (False, 0.0)
    body = raw.http_response.json()
    assert set(body["results"][0]["categories"]) == set(get_args(Category))
    assert set(body["unscored_categories"]) == missing == set(raw.headers["x-unscored-categories"].split(","))


def test_parts_of_one_message_have_one_result(client_of_openai: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": CIVIL}, {"type": "text", "text": RUDE}]
    [result] = client_of_openai.moderations.create(input=parts).results
    [rude] = client_of_openai.moderations.create(input=[RUDE]).results
    assert result.category_scores.harassment == rude.category_scores.harassment


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        (["a"] * 1001, "too_many_texts", "input"),
        ("secret " * 9000, "text_too_long", "input"),
        (["a", "secret " * 9000], "text_too_long", "input.1"),
        ([], "missing_field", "input"),
        (3, "invalid_field", "input"),
        (["a", 3], "invalid_field", "input.1"),
        ([{"type": "image_url", "image_url": {"url": "https://example.org"}}], "unsupported_input_type", "input.0"),
    ],
)
def test_refusals_are_openais(client_of_openai: openai.OpenAI, given: object, code: str, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client_of_openai.moderations.create(input=given)  # type: ignore[arg-type]  # a union of lists
    assert (error.value.code, error.value.param, error.value.type) == (code, param, "invalid_request_error")
    assert "secret" not in error.value.response.text
