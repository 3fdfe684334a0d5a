"""Loads all that a hub can give, as the commands do: `hub_loads.py FOLDER NAME[@REVISION]...` prints one JSON object.

FOLDER is for what is written on the way. A hub's address, token and cache come from the environment, which its client
reads when it is imported: hence a process of its own.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import DataConfig, PolicyConfig, RolloutConfig
from detox_ray.data.sources import read_records
from detox_ray.errors import DetoxError
from detox_ray.evaluation.perplexity import load_reference_model
from detox_ray.export import export
from detox_ray.plan import plan_engine
from detox_ray.policy.adapter import save_adapter
from detox_ray.policy.load import end_token_ids, load_base, load_model_config, load_tokenizer, write_dequantized_base
from detox_ray.policy.policy import Policy
from detox_ray.rewards.classifiers import check_classifier, load_classifier
from detox_ray.rollout.merge import load_pristine_weights
from detox_ray.rollout.transformers_engine import TransformersEngine
from detox_ray.sft_config import SFTConfig

CPU = torch.device("cpu")
Loads = dict[str, Callable[[], Any]]


def loads(name: str, revision: str | None, scratch: Path) -> Loads:
    """What there is to load -> how; what comes of it differs between revisions."""
    if "prompts" in name:
        return {"prompts": lambda: [r["prompt"] for r in read_records(DataConfig(source=name, revision=revision))]}
    if "classifier" in name:
        scorer = ClassifierConfig(name="c", kind="transformers", model=name, revision=revision, label="toxic")
        return {
            "classifier's configuration": lambda: check_classifier(scorer),
            "classifier": lambda: load_classifier(scorer).toxicity(["you are an idiot"]).tolist(),
        }
    policy = PolicyConfig(model=name, revision=revision, quantization="none")
    nf4 = policy.model_copy(update={"quantization": "nf4"})
    return {
        "configuration": lambda: load_model_config(policy).max_position_embeddings,
        "tokenizer": lambda: load_tokenizer(policy).model_max_length,
        "end tokens": lambda: end_token_ids(policy, load_tokenizer(policy)),
        "base": lambda: size(load_base(policy, CPU)),
        "dequantised base": lambda: size_of_folder(write_dequantized_base(nf4, scratch / "nf4", CPU, torch.float32)),
        "reference": lambda: size(load_reference_model(name, revision)),
        "pristine weights": lambda: size_of(load_pristine_weights(name, revision).values()),
        "engine": lambda: next_token(policy),
        "export": lambda: exported(policy, scratch),
    }


def exported(policy: PolicyConfig, scratch: Path) -> Any:
    """Weights and end tokens of a run's export, merged into the published weights."""
    run = scratch / "run"
    save_adapter(Policy(policy, CPU).adapter(0), run / "adapter")
    (run / "config.yaml").write_text(json.dumps(SFTConfig(policy=policy).model_dump(mode="json")))
    folder = export(run, scratch / "export", base="original")
    return size_of_folder(folder), json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def next_token(policy: PolicyConfig) -> list[Any]:
    """The likeliest continuation of three tokens by a rollout engine, with its log-probability."""
    engine = TransformersEngine(plan_engine(policy, RolloutConfig(engine="transformers"), 64, CPU)[0])
    (logprobs,) = engine.next_token_logprobs([[5, 6, 7]])
    token = max(logprobs, key=lambda t: logprobs[t])
    return [token, round(logprobs[token], 4)]


def size(model: torch.nn.Module) -> float:
    return size_of(model.parameters())


def size_of(tensors: Iterable[torch.Tensor]) -> float:
    return round(sum(float(tensor.detach().double().abs().sum()) for tensor in tensors), 3)


def size_of_folder(folder: Path) -> float:
    return size(AutoModelForCausalLM.from_pretrained(folder))


def load_all(targets: list[str], scratch: Path) -> dict[str, dict[str, Any]]:
    """Target -> what is loaded -> what came of it, or the line it was refused with."""
    found: dict[str, dict[str, Any]] = {}
    for number, target in enumerate(targets):
        name, _, revision = target.partition("@")
        (folder := scratch / str(number)).mkdir(parents=True)
        found[target] = {}
        for what, load in loads(name, revision or None, folder).items():
            try:
                found[target][what] = load()
            except DetoxError as error:
                found[target][what] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    print(json.dumps(load_all(sys.argv[2:], Path(sys.argv[1]))))
