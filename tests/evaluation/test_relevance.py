import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from detox_ray.errors import DataError, ModelError
from detox_ray.evaluation.relevance import SentenceEncoder

pytestmark = pytest.mark.unit

WORDS = ["the", "day", "is", "fine", "we", "walk", "in", "rain", "all", "of", "it", "was", "a", "good", "long"]


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    """A random BERT without a pooler, with a word for a token, that reads at most 16."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(vocab={w: i for i, w in enumerate(vocabulary)}, model_max_length=16).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def cosine_one_by_one(folder, prompt, response):
    """Without padding or batches: mean of the last hidden states, then cosine."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        means = [
            model(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0].mean(dim=0)
            for text in (prompt, response)
        ]
    return torch.nn.functional.cosine_similarity(*means, dim=0).item()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_similarity_equals_the_cosine_one_by_one(tiny_encoder, batch_size):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=n)) for n in (1, 3, 9, 2, 5, 40)]
    prompts, responses = [texts[0], texts[0], texts[1], texts[2], texts[5]], [*texts[1:5], texts[0]]
    found = SentenceEncoder(tiny_encoder).similarity(prompts, responses, batch_size)
    expected = [cosine_one_by_one(tiny_encoder, p, r) for p, r in zip(prompts, responses, strict=True)]
    assert found.dtype == np.float64
    assert np.allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 0.05


def test_same_text_is_1_and_no_text_is_0(tiny_encoder):
    encoder = SentenceEncoder(tiny_encoder)
    found = encoder.similarity(["a good day", "a good day", " "], ["a good day", " \n", "rain"], 8)
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert encoder.similarity([], [], 8).shape == (0,)


def test_a_real_encoder_tells_topics_apart(shared):
    model = str(shared / "models" / "minilm-toxicity")
    prompt = "The weather tomorrow will be"
    found = SentenceEncoder(model).similarity(
        [prompt] * 2, ["sunny with a little rain.", "You fool, you know nothing."], 8
    )
    assert found.tolist() == pytest.approx(
        [cosine_one_by_one(model, prompt, r) for r in ("sunny with a little rain.", "You fool, you know nothing.")],
        abs=1e-5,
    )
    assert found[0] > found[1]


def test_what_is_no_encoder_is_one_clear_error(tiny_encoder, tiny_model, tmp_path):
    with pytest.raises(DataError, match="1 prompts for 2 responses"):
        SentenceEncoder(tiny_encoder).similarity(["a"], ["b", "c"], 8)
    with pytest.raises(ModelError, match=r"nowhere.*does not load"):
        SentenceEncoder(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="is a llama, not an encoder"):
        SentenceEncoder(tiny_model)


def test_weights_that_are_no_safetensors_are_refused(tiny_encoder, tmp_path):
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tiny_encoder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="does not load"):
        SentenceEncoder(str(tmp_path))
