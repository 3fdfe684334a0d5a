"""The engine without Ray, against plain transformers."""

import asyncio
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from detox_ray.config import PolicyConfig
from detox_ray.serving.playground.answers import Answer, extended
from detox_ray.serving.playground.engine import EngineDeployment, EngineSetup, PieceTexts
from detox_ray.serving.playground.request import AnswerRequest

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def setup(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> EngineSetup:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(folder)
    policy = PolicyConfig(model=tiny_model, quantization="none")
    return EngineSetup(policy, (folder,), positions=64, threads=1, gpu=False)


def request(**changes: Any) -> AnswerRequest:
    values = {"prompt": "hello there", "temperature": 0, "top_p": 1, "max_new_tokens": 20, "seed": 0}
    return AnswerRequest.model_validate({**values, **changes})


async def whole(engine: EngineDeployment, asked: AnswerRequest) -> list[Answer]:
    answers = [Answer(), Answer()]
    async for step in engine.answer(asked):
        answers = extended(answers, step)
    return answers


def test_answers_are_those_of_transformers(setup: EngineSetup) -> None:
    tokenizer = AutoTokenizer.from_pretrained(setup.policy.model)
    found = asyncio.run(whole(EngineDeployment(setup), request()))
    load = AutoModelForCausalLM.from_pretrained
    alone = [load(setup.policy.model), PeftModel.from_pretrained(load(setup.policy.model), setup.adapters[0]).eval()]
    # As in training: the start token, then the text.
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("hello there", add_special_tokens=False)["input_ids"]]])
    for answer, model in zip(found, alone, strict=True):
        generated = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
        assert answer.text == tokenizer.decode(generated, skip_special_tokens=True)
        assert len(answer.pieces) == len(generated)
        assert answer.pieces[-1].ends == (generated[-1] == tokenizer.eos_token_id)


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(setup: EngineSetup) -> None:
    engine = EngineDeployment(setup)
    assert asyncio.run(engine.refusal(request(prompt="a" * 43))) is None
    refusal = asyncio.run(engine.refusal(request(prompt="a" * 44)))
    assert refusal is not None
    assert "the prompt has 45 tokens and may have 44" in refusal


def test_requests_at_once_get_the_answers_they_get_alone(setup: EngineSetup) -> None:
    engine = EngineDeployment(setup)
    requests = [request(temperature=1, seed=seed) for seed in range(4)]

    async def at_once() -> list[list[Answer]]:
        return await asyncio.gather(*(whole(engine, asked) for asked in requests))

    alone = [asyncio.run(whole(EngineDeployment(setup), asked)) for asked in requests]
    assert asyncio.run(at_once()) == alone
    assert len({answers[0].text for answers in alone}) == 4


def test_an_abandoned_request_leaves_the_engine_free(setup: EngineSetup) -> None:
    engine = EngineDeployment(setup)

    async def abandon_and_ask() -> list[Answer]:
        steps = engine.answer(request(temperature=1, seed=1))
        await anext(steps)
        await steps.aclose()
        return await whole(engine, request())

    assert asyncio.run(abandon_and_ask()) == asyncio.run(whole(EngineDeployment(setup), request()))


def test_a_character_of_several_tokens_comes_whole() -> None:
    """Byte by byte: an accent has two tokens, an emoji four."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "é 🙂!"
    pieces = PieceTexts(tokenizer)
    added = [pieces.add(token) for token in tokenizer(text)["input_ids"]]
    assert added == ["", "é", " ", "", "", "", "🙂", "!"]
