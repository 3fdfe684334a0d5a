import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from detox_ray.evaluation.attribution import (
    integrated_gradients,
    mean_embedding,
    normalized_entropy,
    prompt_share,
)

pytestmark = pytest.mark.unit
pytest.importorskip("captum.attr", reason="the extra `analysis` is not installed", exc_type=ImportError)

PROMPT, RESPONSE = [0, 17, 23, 40, 8, 51], [30, 12, 77, 5]


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval().requires_grad_(False)


class PlantedModel(nn.Module):
    """Its log-odds are a sum over positions of known weights times the embedding, 1 for every token but id 0."""

    def __init__(self, weights):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.tensor([[0.0]] + [[1.0]] * 9))
        self.weights = torch.tensor(weights)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, inputs_embeds, use_cache, logits_to_keep):
        odds = (inputs_embeds[:, :, 0] * self.weights[: inputs_embeds.shape[1]]).sum(dim=1)
        logits = torch.stack([torch.zeros_like(odds), odds], dim=1)[:, None].expand(-1, logits_to_keep, -1)
        return SimpleNamespace(logits=logits)


def logprob_after(model, embeddings, response):
    """Of the response, from the whole logits of the model."""
    logits = model(inputs_embeds=embeddings).logits[0].log_softmax(dim=-1)
    return sum(logits[len(PROMPT) - 1 + i, token] for i, token in enumerate(response))


def test_contributions_add_up_to_the_difference_of_the_outputs(model):
    baseline = mean_embedding(model)
    assert torch.allclose(baseline, model.get_input_embeddings().weight.mean(dim=0))
    found = integrated_gradients(model, PROMPT, RESPONSE, baseline, steps=256, start_length=1)
    assert found.tokens.shape == (len(PROMPT) + len(RESPONSE) - 1,)

    ids = torch.tensor([PROMPT + RESPONSE])
    with torch.no_grad():
        labels = torch.tensor([[-100] * len(PROMPT) + RESPONSE])
        logprob = -model(input_ids=ids, labels=labels).loss.item() * len(RESPONSE)
        start = baseline.expand(1, ids.shape[1] - 1, -1).clone()
        start[:, 0] = model.get_input_embeddings()(ids[:, 0])
        change = logprob - logprob_after(model, start, RESPONSE).item()
    assert found.change == pytest.approx(change, rel=1e-4)
    assert found.tokens.sum() == pytest.approx(change, rel=0.01)
    assert found.relative_error < 0.01


def test_contributions_equal_a_plain_sum_of_gradients_along_the_path(model):
    baseline = mean_embedding(model)
    found = integrated_gradients(model, PROMPT, RESPONSE, baseline, steps=256)
    end = model.get_input_embeddings()(torch.tensor([PROMPT + RESPONSE[:-1]]))
    start = baseline.expand_as(end)
    total = torch.zeros_like(end)
    steps = 1000
    for step in range(steps):
        point = (start + (step + 0.5) / steps * (end - start)).requires_grad_()
        (gradient,) = torch.autograd.grad(logprob_after(model, point, RESPONSE), point)
        total += gradient / steps
    expected = ((end - start) * total).sum(dim=-1)[0].numpy()
    assert np.allclose(found.tokens, expected, atol=0.01 * np.abs(expected).max())


def test_the_start_token_contributes_nothing(model):
    found = integrated_gradients(model, PROMPT, RESPONSE, mean_embedding(model), steps=8, start_length=1)
    assert found.tokens[0] == 0
    assert (found.tokens[1:] != 0).all()


def test_the_last_token_of_a_response_is_not_read(model):
    """With a response of one token nothing but the prompt is read, so it has it all."""
    found = integrated_gradients(model, PROMPT, RESPONSE[:1], mean_embedding(model), steps=8)
    assert len(found.tokens) == len(PROMPT)
    assert prompt_share(found.tokens, len(PROMPT)) == 1


@pytest.mark.parametrize(
    ("weights", "entropy", "share"),
    [
        ([0.0, 0.0, 2.0, 0.0, 0.0], 0.0, 1.0),
        ([1.0, 1.0, -1.0, 1.0, 0.0], 1.0, 1.0),
        # Shares 1/2, 1/4, 1/4, 0 of the prompt: 1.5 bits of 2; the prefix has as much as the prompt.
        ([1.0, 0.5, 0.5, 0.0, 2.0], 0.75, 0.5),
    ],
)
def test_entropy_and_share_of_planted_models(weights, entropy, share):
    found = integrated_gradients(PlantedModel(weights), [1, 2, 3, 4], [1, 1], torch.zeros(1), steps=16)
    assert normalized_entropy(found.tokens[:4]) == pytest.approx(entropy, abs=1e-6)
    assert prompt_share(found.tokens, 4) == pytest.approx(share, abs=1e-6)
    odds = sum(weights)
    assert found.change == pytest.approx(2 * (math.log(2) - math.log1p(math.exp(-odds))), rel=1e-5)
    assert found.relative_error < 1e-4


def test_a_model_that_reads_nothing_has_no_attribution():
    found = integrated_gradients(PlantedModel([0.0] * 5), [1, 2, 3, 4], [1, 1], torch.zeros(1), steps=4)
    assert math.isnan(normalized_entropy(found.tokens[:4]))
    assert math.isnan(prompt_share(found.tokens, 4))
    assert math.isnan(normalized_entropy(np.array([1.0])))
