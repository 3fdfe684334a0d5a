"""A small T5 from scratch, the model of the benchmark of encoder-decoders: tokenizer, training loop, checkpoint.

    python benchmarks/t5_pretraining.py --dialogsum FOLDER --texts FILE... --out FOLDER [--minutes N]

It learns two tasks from one instruction: to summarise DialogSum's dialogues, and to finish web sentences
(RealToxicityPrompts' records), so that what it says of a toxic text can be toxic. ROUGE of its greedy summaries of the
dev split is measured as it trains and at the end, beside what takes no model: each dialogue's first utterance (lead-1),
and one sentence for all dialogues.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe, machine, write_json
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

INSTRUCTION = "Summarize: "
VOCABULARY = 4096
# A speaker's tag, a word, a digit, a run of other signs or of white space, each with the space before it.
PIECES = Regex(r" ?#Person\d#| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}#]+| ?#|\s+")
ONE_FOR_ALL = "#Person1# asks #Person2# for help and #Person2# tells #Person1# how to do it."
LONGEST_SOURCE, LONGEST_TARGET = 96, 40
BATCH = 32
WINDOW = 16  # batches sorted by length together
PEAK_RATE = 2e-2  # of each tensor's own scale, as Adafactor means it
WARM_UP = 100
LOOKS, WATCHED = 4, 96  # how often the dev split is looked at during the training, and its dialogues summarised then
Text = tuple[str, str]  # source, target
Pair = tuple[list[int], list[int]]


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dialogsum", type=Path, required=True, help="folder of dialogsum.{train,dev}.jsonl")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="RealToxicityPrompts files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=12.0, help="of processor time, with looks at the dev split")
    options = parser.parse_args()
    console = Console(width=140)
    facts = machine(("torch", "transformers", "rouge-score"))
    console.print(describe(facts))
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    dialogues, dev = (dialogue_texts(options.dialogsum / f"dialogsum.{split}.jsonl") for split in ("train", "dev"))
    texts = dialogues + sentence_texts(options.texts)
    tokenizer = train_tokenizer([text for pair in texts for text in pair])
    tokenizer.save_pretrained(options.out)
    model = T5ForConditionalGeneration(model_config())
    console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(texts)} pairs")
    curve = []

    def watch(line: dict[str, float]) -> None:
        model.save_pretrained(options.out)
        found = {"dev_loss": dev_loss(model, encoded(dev, tokenizer)), "rouge": rouge(model, tokenizer, dev[:WATCHED])}
        curve.append(line | found)
        console.print_json(json.dumps(curve[-1]), indent=None)

    train(model, encoded(texts, tokenizer), 60 * options.minutes, watch)
    found = rouge(model, tokenizer, dev)
    console.print(f"ROUGE of {len(dev)} dev dialogues: {json.dumps(found)}")
    write_json(options.out / "pretraining.json", {"rouge": found, "curve": curve, "machine": facts})


def model_config() -> T5Config:
    """1.3M parameters."""
    tokens: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        **tokens,
    )


def dialogue_texts(path: Path) -> list[Text]:
    """(dialogue, summary)."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(record["dialogue"].strip(), record["summary"].strip()) for record in records]


def sentence_texts(paths: Sequence[Path]) -> list[Text]:
    """(first half, second half) of sentences."""
    records = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [(record["prompt"]["text"].strip(), record["continuation"]["text"].strip()) for record in records]
    return [pair for pair in pairs if all(pair)]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding whose texts end in </s>, as T5's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([INSTRUCTION, *texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def encoded(texts: Sequence[Text], tokenizer: Any) -> list[Pair]:
    """Source and target in tokens, each with its end token; longer ones are cut."""
    sources = tokenizer([INSTRUCTION + source for source, _ in texts])["input_ids"]
    targets = tokenizer([target for _, target in texts])["input_ids"]
    return [
        ([*source[: LONGEST_SOURCE - 1], 1] if len(source) > LONGEST_SOURCE else source, target[:LONGEST_TARGET])
        for source, target in zip(sources, targets, strict=True)
    ]


def train(model: Any, pairs: list[Pair], seconds: float, watch: Callable[[dict[str, float]], None]) -> None:
    """Adafactor, bfloat16; the learning rate rises for `WARM_UP` steps and falls to 0 as the time is used up."""
    optimizer = torch.optim.Adafactor(model.parameters(), lr=PEAK_RATE)
    started = watched = time.process_time()
    losses: list[float] = []
    model.train()
    for step, batch in enumerate(batches(pairs), start=1):
        elapsed = time.process_time() - started
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(step / WARM_UP, max(1 - elapsed / seconds, 0.0))
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if elapsed > seconds or time.process_time() - watched > seconds / LOOKS:
            watch({"step": step, "seconds": round(elapsed), "loss": round(sum(losses) / len(losses), 3)})
            model.train()
            watched, losses = time.process_time(), []
        if elapsed > seconds:
            return


def loss_of(model: Any, batch: Sequence[Pair]) -> torch.Tensor:
    """Mean cross-entropy of the targets' tokens."""
    source, target = (padded([pair[side] for pair in batch], fill) for side, fill in ((0, 0), (1, -100)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=source, attention_mask=(source != 0).long(), labels=target).loss


def batches(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Seeded passes over the pairs, in batches of similar length, without an end."""
    generator = random.Random(0)
    while True:
        order = generator.sample(pairs, len(pairs))
        for start in range(0, len(order) - WINDOW * BATCH, WINDOW * BATCH):
            window = sorted(order[start : start + WINDOW * BATCH], key=lambda pair: len(pair[0]))
            cut = [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
            yield from generator.sample(cut, len(cut))


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    """[B, longest] int64."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


@torch.inference_mode()
def dev_loss(model: Any, pairs: Sequence[Pair]) -> float:
    """Mean over the batches."""
    model.eval()
    losses = [float(loss_of(model, pairs[start : start + BATCH])) for start in range(0, len(pairs), BATCH)]
    return round(sum(losses) / len(losses), 3)


@torch.inference_mode()
def rouge(model: Any, tokenizer: Any, dev: Sequence[Text]) -> dict[str, dict[str, float]]:
    """Mean F1 of the greedy summaries and of what takes no model."""
    model.eval()
    written = []
    for start in range(0, len(dev), BATCH):
        ids = padded([source for source, _ in encoded(dev[start : start + BATCH], tokenizer)], 0)
        found = model.generate(
            input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=LONGEST_TARGET, do_sample=False
        )
        written += tokenizer.batch_decode(found, skip_special_tokens=True)
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds)
    systems = {
        "lead-1": [dialogue.partition("\n")[0] for dialogue, _ in dev],
        "one for all": [ONE_FOR_ALL] * len(dev),
        "model, greedy": written,
    }
    result = {}
    for name, texts in systems.items():
        scores = [scorer.score(summary, text) for (_, summary), text in zip(dev, texts, strict=True)]
        result[name] = {kind: round(sum(s[kind].fmeasure for s in scores) / len(scores), 4) for kind in kinds}
    return result


if __name__ == "__main__":
    main()
