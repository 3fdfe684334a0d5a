"""A real but tiny BERT sequence classifier, trained in about a second to tell rude words from civil ones."""

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

CIVIL = [
    "thank you for the kind help",
    "that is a good idea",
    "you are right friend",
    "have a nice day",
    "the idea is kind",
]
RUDE = ["you are an idiot", "that is a stupid idea", "shut up fool", "what a dumb idiot you are", "the fool is stupid"]
WORDS = sorted({word for text in CIVIL + RUDE for word in text.split()})


def save_tiny_classifier(
    folder: Path, labels: tuple[str, ...] = ("neutral", "toxic"), problem_type: str | None = None, toxic: int = -1
) -> Path:
    """Trains and saves a classifier whose label number `toxic` means toxic; the others mean not toxic."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(vocabulary), model_max_length=32)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type=problem_type,
    )
    model = BertForSequenceClassification(config)
    batch = tokenizer(CIVIL + RUDE, padding=True, return_tensors="pt")
    is_rude = torch.tensor([0.0] * len(CIVIL) + [1.0] * len(RUDE))
    targets = (1.0 - is_rude).unsqueeze(1).repeat(1, len(labels))
    targets[:, toxic] = is_rude
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        logits = model(**batch).logits
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
