"""What an analysis starts from: a part of the generations, and one base model with the adapters to compare it with."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel

from detox_ray.config import Config, PolicyConfig, RolloutConfig
from detox_ray.data.lab import resolve_lab
from detox_ray.data.templates import start_ids
from detox_ray.errors import DataError, ModelError, one_line
from detox_ray.metrics_file import ADAPTER_FOLDER, EVALUATION_FILE, FINE_TUNING_FILE
from detox_ray.policy.adapter import CONFIG_FILE, TENSOR_FILE
from detox_ray.policy.adapter_weights import put_adapters
from detox_ray.policy.load import (
    compute_dtype,
    load_base,
    load_model_config,
    load_tokenizer,
    write_dequantized_base,
)
from detox_ray.run_folder import RunFolder
from detox_ray.sft_config import SFTConfig, load_run_config

GENERATIONS_FILE = "generations.parquet"
_COLUMNS = ["system", "prompt_id", "prompt", "response", "response_ids", "toxicity"]


@dataclass(frozen=True)
class Response:
    """A response with its tokens (at least one) and the judge's toxicity of it."""

    text: str
    token_ids: list[int]
    toxicity: float


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with one response of each system, by name.

    `token_ids` is what the systems continued; its first `start_length` tokens begin a document and are no text.
    """

    text: str
    token_ids: list[int]
    start_length: int
    responses: dict[str, Response]


@dataclass(frozen=True)
class ComparedSystems:
    """One base model in memory, and the adapters that make the tuned systems of it.

    `adapter_names` maps a tuned system's name to the name that PEFT knows its adapter by.
    """

    model: PeftModel
    tokenizer: Any
    reference: str
    adapter_names: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The reference, then the tuned systems."""
        return [self.reference, *self.adapter_names]

    @contextmanager
    def answering_as(self, system: str) -> Iterator[Any]:
        """The model as that system computes."""
        if system == self.reference:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(self.adapter_names[system], inference_mode=True)
            yield self.model


def read_run_config(folder: Path) -> Config | SFTConfig:
    """The configuration of a run folder of either kind, with the lab's paths in place of `lab:...`.

    Raises:
        DataError: there is none.
        ConfigError: it is not valid.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(f"{folder} has no config.yaml, which names the base model: give a run folder such as runs/demo")
    return resolve_lab(load_run_config(path))


def served_base(folder: Path, config: Config | SFTConfig) -> PolicyConfig:
    """The base that the run's rollout engines answered with: the dequantised twin where they had one."""
    rollout = config.rollout if isinstance(config, Config) else RolloutConfig()
    plain = config.policy.model_copy(update={"quantization": "none"})
    if rollout.base == "original" or config.policy.quantization == "none":
        return plain
    dtype = compute_dtype(config.policy, torch.device("cuda" if config.train.num_gpus > 0 else "cpu"))
    path = RunFolder(folder).dequantized_base(config.policy, str(dtype).removeprefix("torch."))
    twin = write_dequantized_base(config.policy, path, _device(), dtype)
    return plain.model_copy(update={"model": str(twin), "revision": None})


def reference_name(folder: Path) -> str:
    """The system that the others are compared with: what evaluation.json says, else "base".

    Raises:
        DataError: evaluation.json is no JSON object.
    """
    path = folder / EVALUATION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return str(content.get("reference", "base"))
    except (ValueError, AttributeError):
        raise DataError(f"{path} is not an evaluation: evaluate again") from None


def check_adapter_folders(adapters: Mapping[str, Path]) -> None:
    """Look for every adapter before anything is loaded.

    Raises:
        DataError: one is not there.
    """
    for system, path in adapters.items():
        for file in (CONFIG_FILE, TENSOR_FILE):
            if not (path / file).is_file():
                raise DataError(
                    f"no adapter of {system!r}: {path} has no {file}; finish the training, or give its folder"
                )


def default_adapters(folder: Path) -> dict[str, Path]:
    """The adapter of a run folder of either kind, under the name its responses have."""
    name = "fine-tuned" if (folder / FINE_TUNING_FILE).exists() else "tuned"
    return {name: folder / ADAPTER_FOLDER}


def check_decoder_only(policy: PolicyConfig) -> None:
    """Refuse what attribution does not follow.

    Raises:
        ModelError: the model is an encoder-decoder.
    """
    model_config = load_model_config(policy)
    if model_config.is_encoder_decoder:
        raise ModelError(
            f"{policy.model} is an encoder-decoder ({model_config.model_type}); detox-ray analyze reads decoder-only "
            "models, and detox-ray evaluate and report read this one too"
        )


def load_systems(policy: PolicyConfig, reference: str, adapters: Mapping[str, Path]) -> ComparedSystems:
    """The base with all adapters attached, on a GPU where there is one.

    Raises:
        ModelError: the base cannot be loaded, or an adapter was made for another.
    """
    tokenizer = load_tokenizer(policy)
    base = load_base(policy, _device())
    # PEFT's own names may hold no dots.
    names = {system: f"adapter_{number}" for number, system in enumerate(adapters)}
    model = put_adapters(base, {names[system]: path for system, path in adapters.items()})
    return ComparedSystems(model.eval(), tokenizer, reference, names)


def read_generations(path: Path, systems: Sequence[str]) -> pa.Table:
    """The columns that an analysis needs of generations.parquet, in which all of `systems` answered.

    Raises:
        DataError: there is no such file, it is not Parquet, lacks a column, or has no responses of a system.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: evaluate the run first")
    try:
        columns = pq.read_schema(path).names
        if missing := [name for name in _COLUMNS if name not in columns]:
            raise DataError(f"{path} lacks the columns {', '.join(missing)}: evaluate the run again")
        table = pq.read_table(path, columns=_COLUMNS)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {one_line(error)}") from None
    there = table.column("system").unique().to_pylist()
    if absent := [system for system in systems if system not in there]:
        raise DataError(f"{path} has no responses of {absent[0]!r}; it has those of {', '.join(map(repr, there))}")
    return table


def choose_prompts(prompt_ids: Iterable[str], seed: int) -> list[str]:
    """The prompts in the order in which they are taken: it goes by seed and id, never by the order of the file."""
    return sorted(set(prompt_ids), key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())


def answered_prompts(
    table: pa.Table, systems: ComparedSystems, limit: int, seed: int
) -> tuple[list[AnsweredPrompt], dict[str, int]]:
    """Up to `limit` prompts with the first response of every system to each, and how many were passed over, by reason.

    The prompt's tokens are those that the data module makes of its text, and so are a response's where the table has
    none (another program wrote it).

    Raises:
        DataError: no prompt is left, or a response has tokens that the model does not know.
    """
    first: dict[str, dict[str, int]] = {name: {} for name in systems.names}
    keys = zip(table.column("system").to_pylist(), table.column("prompt_id").to_pylist(), strict=True)
    for row, (system, prompt_id) in enumerate(keys):
        if system in first:
            first[system].setdefault(prompt_id, row)
    everywhere = set.intersection(*(set(rows) for rows in first.values()))
    skipped: Counter[str] = Counter()
    if apart := len(set.union(*(set(rows) for rows in first.values()))) - len(everywhere):
        skipped["not answered by every system"] = apart
    prompts: list[AnsweredPrompt] = []
    for prompt_id in choose_prompts(everywhere, seed):
        if len(prompts) == limit:
            break
        rows = table.take([first[name][prompt_id] for name in systems.names]).to_pylist()
        prompt = _answered_prompt(dict(zip(systems.names, rows, strict=True)), systems)
        if reason := _unusable(prompt, systems.model.config):
            skipped[reason] += 1
        else:
            prompts.append(prompt)
    if not prompts:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none"
        raise DataError(f"no prompt is left to analyse ({counts}): evaluate with more prompts")
    return prompts, dict(skipped)


def _answered_prompt(rows: dict[str, dict[str, Any]], systems: ComparedSystems) -> AnsweredPrompt:
    def encoded(text: str) -> list[int]:
        return list(systems.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    start = start_ids(systems.tokenizer)
    text = rows[systems.reference]["prompt"]
    responses = {}
    for system, row in rows.items():
        toxicity = row["toxicity"]
        ids = list(row["response_ids"] or encoded(row["response"]))
        responses[system] = Response(row["response"], ids, math.nan if toxicity is None else float(toxicity))
    return AnsweredPrompt(text, [*start, *encoded(text)], len(start), responses)


def _unusable(prompt: AnsweredPrompt, model_config: Any) -> str | None:
    """Why a prompt is passed over, or None.

    Raises:
        DataError: a token is outside the model's vocabulary.
    """
    if not prompt.token_ids:
        return "empty prompt"
    longest = getattr(model_config, "max_position_embeddings", None) or math.inf
    for response in prompt.responses.values():
        if not response.token_ids:
            return "empty response"
        if math.isnan(response.toxicity):
            return "no toxicity"
        if max(response.token_ids) >= model_config.vocab_size:
            raise DataError(
                f"a response has the token {max(response.token_ids)}, and the model knows {model_config.vocab_size}: "
                "give the model that wrote the responses"
            )
        if len(prompt.token_ids) + len(response.token_ids) > longest:
            return "too long for the model"
    return None


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
