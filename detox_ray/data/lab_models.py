"""The lab's models, trained from nothing on the lab's text: a tokenizer, a small Llama and two reward classifiers."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from detox_ray.data.lab_text import Exchange

END_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
END_ID, PAD_ID = 0, 1
CONTEXT = 512
# A prompt's tokens say little (its words are drawn at random): most of the gradient should teach the response.
PROMPT_WEIGHT = 0.2

Progress = Callable[[float], None]


def train_tokenizer(texts: Sequence[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `texts`, of at most `vocab_size` tokens: id 0 is the end token, id 1 the pad token.

    The end token also begins a document (bos and eos are one, as in GPT-2), but the tokenizer adds none by itself.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _wrap(bpe, "left")


def train_policy(
    exchanges: Sequence[Exchange],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    progress: Progress,
    *,
    steps: int = 600,
    batch_size: int = 32,
    learning_rate: float = 6e-3,
) -> LlamaForCausalLM:
    """A small Llama that writes exchanges; each training document is one exchange between end tokens."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            # Few wide heads and a wide start: with four heads or the usual 0.02 it learns to copy the topic much later.
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.04,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=END_ID,
            eos_token_id=END_ID,
            pad_token_id=PAD_ID,
        )
    )
    prompts = tokenizer([e.prompt for e in exchanges], add_special_tokens=False)["input_ids"]
    responses = tokenizer([e.response for e in exchanges], add_special_tokens=False)["input_ids"]
    documents = [torch.tensor([END_ID, *p, *r, END_ID]) for p, r in zip(prompts, responses, strict=True)]
    weights = [
        torch.tensor([PROMPT_WEIGHT] * (1 + len(p)) + [1.0] * (len(r) + 1))
        for p, r in zip(prompts, responses, strict=True)
    ]
    batches = _batches([len(d) for d in documents], steps, batch_size, seed)

    def loss(step: int) -> torch.Tensor:
        ids = pad_sequence([documents[i] for i in batches[step]], batch_first=True, padding_value=PAD_ID)
        weight = pad_sequence([weights[i] for i in batches[step]], batch_first=True)[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return (losses * weight).sum() / weight.sum()

    _fit(model, loss, steps, learning_rate, progress)
    return model


def train_classifier(
    exchanges: Sequence[Exchange],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    progress: Progress,
    *,
    steps: int = 150,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
) -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast]:
    """A small BERT that reads a response as 0 `civil` or 1 `rude`, and its tokenizer.

    Its tokenizer is the policy's with the end token put before every text, which the model pools. Labels are smoothed,
    so that its logits level off instead of preferring one civil response to another.
    """
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=PAD_ID,
            id2label={0: "civil", 1: "rude"},
            label2id={"civil": 0, "rude": 1},
        )
    )
    bpe = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{END_TOKEN} $A", pair=f"{END_TOKEN} $A $B", special_tokens=[(END_TOKEN, END_ID)]
    )
    own_tokenizer = _wrap(bpe, "right")
    documents = [torch.tensor(ids) for ids in own_tokenizer([e.response for e in exchanges])["input_ids"]]
    labels = torch.tensor([int(e.rude) for e in exchanges])
    batches = _batches([len(d) for d in documents], steps, batch_size, seed)

    def loss(step: int) -> torch.Tensor:
        ids = pad_sequence([documents[i] for i in batches[step]], batch_first=True, padding_value=PAD_ID)
        logits = model(input_ids=ids, attention_mask=(ids != PAD_ID).long()).logits
        return cross_entropy(logits, labels[batches[step]], label_smoothing=0.05)

    _fit(model, loss, steps, learning_rate, progress)
    return model, own_tokenizer


def classifier_accuracy(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[Exchange]
) -> float:
    """The share of the exchanges' responses that `model` labels right."""
    batch = tokenizer([e.response for e in exchanges], padding=True, return_tensors="pt")
    with torch.no_grad():
        labels = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    return float((labels == torch.tensor([int(e.rude) for e in exchanges])).float().mean())


def save_linear_classifier(train: Sequence[Exchange], heldout: Sequence[Exchange], folder: Path) -> float:
    """Fits a logistic regression on hashed words of the responses, saves it, and returns its held-out accuracy.

    The folder holds no pickle: `linear.json` has the settings of scikit-learn's HashingVectorizer (`n_features`,
    `ngram_range`, `lowercase`, `alternate_sign`, `norm`), `linear.safetensors` has `coef: [n_features] float32` and
    `intercept: [1] float32`. P(rude) = sigmoid(x . coef + intercept).
    """
    settings = {"n_features": 4096, "ngram_range": [1, 1], "lowercase": True, "alternate_sign": False, "norm": "l2"}
    vectorizer = HashingVectorizer(**{**settings, "ngram_range": (1, 1)})
    regression = LogisticRegression(C=10.0, max_iter=500)
    regression.fit(vectorizer.transform([e.response for e in train]), [int(e.rude) for e in train])
    folder.mkdir(parents=True)
    (folder / "linear.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tensors = {
        "coef": np.ascontiguousarray(regression.coef_[0], dtype=np.float32),
        "intercept": np.asarray(regression.intercept_, dtype=np.float32),
    }
    save_file(tensors, folder / "linear.safetensors")
    responses = vectorizer.transform([e.response for e in heldout])
    return float(regression.score(responses, [int(e.rude) for e in heldout]))


def _wrap(bpe: Tokenizer, padding_side: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side=padding_side,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _batches(lengths: Sequence[int], steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """`steps` lists of `batch_size` document indices; documents of like length share a batch, to save padding."""
    generator = torch.Generator().manual_seed(seed)
    pool_batches = 16
    pool = pool_batches * batch_size
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(order) - pool + 1, pool):
            by_length = sorted(order[start : start + pool], key=lambda i: lengths[i])
            shuffled = torch.randperm(pool_batches, generator=generator).tolist()
            batches += [by_length[k * batch_size : (k + 1) * batch_size] for k in shuffled]
    return batches[:steps]


def _fit(
    model: PreTrainedModel, loss: Callable[[int], torch.Tensor], steps: int, learning_rate: float, progress: Progress
) -> None:
    """AdamW over `steps` losses; the learning rate rises for a tenth of them, then falls to 0 by a cosine."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = max(1, steps // 10)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        progress((step + 1) / steps)
    model.eval()
