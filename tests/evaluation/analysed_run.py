"""A run folder to analyse, a judge that reads one word, and the same systems as `transformers` and `peft` load them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.config_file import dump_config, parse_config
from detox_ray.policy.adapter import save_adapter
from detox_ray.policy.policy import Policy

PROMPTS = [f"the day number {n} was" for n in range(14)]


class WordJudge:
    """Toxic is what says "fool"."""

    name = "words"

    def toxicity(self, texts):
        return np.array([0.9 if "fool" in text else 0.1 for text in texts])


def save_random_adapter(model, folder):
    policy = Policy(
        PolicyConfig(model=model, quantization="none", lora=LoraConfig(rank=4, alpha=8)), torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_adapter(policy.adapter(0), folder)


def row(tokenizer, system, prompt, response, sample=0, toxicity=None, known_ids=True):
    ids = tokenizer(response, add_special_tokens=False)["input_ids"] if known_ids else []
    toxicity = WordJudge().toxicity([response])[0] if toxicity is None else toxicity
    return {
        "system": system,
        "prompt_id": f"id-{prompt}",
        "prompt": prompt,
        "sample": sample,
        "response": response,
        "response_ids": ids,
        "toxicity": toxicity,
    }


def make_run(folder, model, rows, quantization="none"):
    """A run folder of `model` with a random adapter and these generations."""
    folder.mkdir(exist_ok=True)
    save_random_adapter(model, folder / "adapter")
    words = {"name": "words", "kind": "linear", "model": "operator:length_hint"}
    tree = {"name": folder.name, "reward": {"classifiers": [words]}, "data": {"source": "prompts.txt"}}
    config = parse_config(tree | {"policy": {"model": model, "quantization": quantization}})
    (folder / "config.yaml").write_text(dump_config(config))
    pq.write_table(pa.Table.from_pylist(rows), folder / "generations.parquet")
    return folder


def all_rows(tokenizer):
    """Two samples a prompt, of which the second is never looked at; every third base response is rude."""
    rows = []
    for n, prompt in enumerate(PROMPTS):
        base = " bad, you fool!" if n % 3 == 0 else f" fine and {n} ok"
        rows.append(row(tokenizer, "base", prompt, base))
        rows.append(row(tokenizer, "base", prompt, "never read", sample=1))
        # The second system's tokens are unknown: they are made of the text.
        rows.append(row(tokenizer, "tuned", prompt, f" calm, all {'is' * (n % 2)} well.", known_ids=False))
        rows.append(row(tokenizer, "tuned", prompt, "never read", sample=1))
    return rows


class PlainModels:
    """The same two systems as transformers and peft load them, one sequence at a time."""

    def __init__(self, model, adapter):
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        base, other = (AutoModelForCausalLM.from_pretrained(model).eval() for _ in range(2))
        self.models = {"base": base, "tuned": PeftModel.from_pretrained(other, str(adapter)).eval()}

    def ids(self, prompt, response):
        # The tokenizer's end token is its start token as well, so it begins the document.
        start = self.tokenizer.bos_token_id
        prompt_ids = [start, *self.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        return prompt_ids, self.tokenizer(response, add_special_tokens=False)["input_ids"]

    def loss(self, system, prompt, response):
        """Nats a token by the model's own loss, and the tokens."""
        prompt_ids, response_ids = self.ids(prompt, response)
        labels = torch.tensor([[-100] * len(prompt_ids) + response_ids])
        with torch.no_grad():
            loss = self.models[system](input_ids=torch.tensor([prompt_ids + response_ids]), labels=labels).loss
        return loss.item(), len(response_ids)

    def entropies(self, system, prompt, response):
        prompt_ids, response_ids = self.ids(prompt, response)
        with torch.no_grad():
            logits = self.models[system](input_ids=torch.tensor([prompt_ids + response_ids])).logits[0]
        return torch.distributions.Categorical(logits=logits[len(prompt_ids) - 1 : -1]).entropy().tolist()
