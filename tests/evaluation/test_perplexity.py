import numpy as np
import pytest
import torch

from detox_ray.errors import DataError, ModelError
from detox_ray.evaluation.meter import PerplexityModel
from detox_ray.evaluation.perplexity import load_reference_model, response_nll
from detox_ray.evaluation.responses import SystemResponses
from detox_ray.records import Prompt, Rollout

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 64, size=n).tolist() for n in rng.integers(1, 12, size=23)]
    responses = [rng.integers(2, 64, size=n).tolist() for n in rng.integers(0, 15, size=23)]
    responses[4] = []
    # The pad token can also be an ordinary token of a response.
    responses[5] = [0, 3, 0, 0]
    return prompts, responses


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_nll_equals_the_loss_of_transformers_one_by_one(tiny_llama, sequences, batch_size):
    prompts, responses = sequences
    nll, tokens = response_nll(tiny_llama, prompts, responses, batch_size, pad_id=0)
    assert tokens.tolist() == [len(r) for r in responses]
    for prompt, response, value in zip(prompts, responses, nll, strict=True):
        if not response:
            assert value == 0
            continue
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            loss = tiny_llama(input_ids=torch.tensor([prompt + response]), labels=labels).loss
        assert value == pytest.approx(loss.item() * len(response), rel=1e-4)


def test_what_is_longer_than_the_model_reads_is_cut(tiny_llama):
    most = tiny_llama.config.max_position_embeddings
    long = np.random.default_rng(0).integers(2, 64, most + 40)
    found = []
    for prompt, response in ((long[:5], long), (long, long[:5]), (long[:most], long), (long[:3], long[:4])):
        rollout = Rollout("a", "", prompt, response, np.zeros(0, np.float32), "", "", 0)
        responses = SystemResponses("long", [Prompt("a", "", ())], [[rollout]])
        nll, tokens = PerplexityModel(tiny_llama, pad_id=0).nll(responses)
        assert np.isfinite(nll).all()
        found.append(int(tokens[0, 0]))
    assert found == [most - 5, 5, most - most // 2, 4]


def test_scoring_leaves_the_model_as_it_was(tiny_llama):
    tiny_llama.train()
    response_nll(tiny_llama, [[2]], [[3]], 1, pad_id=0)
    assert tiny_llama.training
    tiny_llama.eval()


def test_a_prompt_without_tokens_is_refused(tiny_llama):
    with pytest.raises(DataError, match="no tokens"):
        response_nll(tiny_llama, [[]], [[3]], 1, pad_id=0)
    with pytest.raises(DataError, match="1 prompts for 2 responses"):
        response_nll(tiny_llama, [[2]], [[3], [4]], 1, pad_id=0)


def test_reference_model_loads_safetensors_in_evaluation_mode(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    model = load_reference_model(str(tmp_path))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    ours, _ = response_nll(model, [[2, 3]], [[4, 5]], 1, pad_id=0)
    theirs, _ = response_nll(tiny_llama, [[2, 3]], [[4, 5]], 1, pad_id=0)
    assert ours == pytest.approx(theirs, rel=0.02 if torch.cuda.is_available() else 1e-6)


def test_a_folder_without_a_model_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="does not load"):
        load_reference_model(str(tmp_path))


def test_of_an_encoder_decoder_it_is_the_response_given_the_prompt(tiny_t5):
    model = load_reference_model(tiny_t5)
    prompts, responses = [[5, 6, 7, 0], [9, 0], [8, 0]], [[20, 21], [22, 23, 24], []]
    nll, tokens = response_nll(model, prompts, responses, 2, pad_id=1)
    assert tokens.tolist() == [2, 3, 0]
    for found, prompt, response in zip(nll[:2], prompts, responses, strict=False):
        ids = torch.tensor([prompt], device=model.device)
        labels = torch.tensor([response], device=model.device)
        assert found == pytest.approx(float(model(input_ids=ids, labels=labels).loss) * len(response), rel=1e-4)
